"""RetinaNet that distils from an attached teacher."""

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet

from ..distillation.traces import DenseTrace
from .dense import DenseStudent


@META_ARCH_REGISTRY.register()
class CrossKDRetinaNet(DenseStudent, RetinaNet):
    """``RetinaNet`` that, once a teacher is attached, also returns distillation losses in
    training."""

    stock_class = RetinaNet
    kd_depth = 3
    kd_box_type = "giou"

    def kd_normalizer(self, trace: DenseTrace) -> torch.Tensor:
        """The sum over the images of max(positives, 1)."""
        return self.positives(trace).sum(dim=1).clamp(min=1).sum()
