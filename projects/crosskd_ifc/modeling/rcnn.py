"""Faster, Mask, Keypoint and Cascade R-CNN that distil from an attached teacher."""

from typing import ContextManager, List

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from ..distillation.compatibility.two_stage import check_pair
from ..distillation.distiller import RCNNDistiller
from ..distillation.head_layers import box_stages
from ..distillation.teacher import Teacher
from ..distillation.traces import HeadTrace
from .classes import build_class_map, needs_class_map
from .student import Student


@META_ARCH_REGISTRY.register()
class CrossKDRCNN(Student, GeneralizedRCNN):
    """``GeneralizedRCNN`` that, once a teacher is attached, also returns distillation losses
    in training.

    Without a teacher, in evaluation and export it is its parent, bit for bit; so are its checkpoint
    keys, but for ``fusion.*`` where adapters are learned.
    """

    def build_distiller(self, cfg: CfgNode, teacher: Teacher) -> RCNNDistiller:
        own_predictions = cfg.MODEL.CROSSKD.MIMIC != "cross_head"
        check_pair(self, teacher, own_predictions=own_predictions)
        class_map = build_class_map(cfg, self, teacher, needs_class_map(cfg))
        return RCNNDistiller(cfg, self, teacher, class_map)

    def predictors(self) -> List[nn.Module]:
        return [stage.predictor for stage in box_stages(self.roi_heads)]

    def record(self) -> ContextManager[HeadTrace]:
        return self.roi_heads.record()
