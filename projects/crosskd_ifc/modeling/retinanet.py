"""RetinaNet that distils from an attached teacher.

Shape shorthand: N images, R anchors of an image over all levels.
"""

from typing import List, Optional, Tuple

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import ImageList

from ..distillation.compatibility.anchors import padding
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

    def inside(self, images: ImageList, features: List[torch.Tensor]) -> Optional[torch.Tensor]:
        """(N, R) whether an anchor's position lies in its image as that would be padded alone.

        What the rest of the batch pads an image with holds nothing to learn from; CrossKD's weight
        there is 0 (that of FCOS is not).
        """
        sizes = [self._padded_alone(size) for size in images.image_sizes]
        batch = tuple(images.tensor.shape[-2:])
        if all(size == batch for size in sizes):
            return None
        levels = []
        for x, stride, anchors in zip(
            features, self.anchor_generator.strides, self.anchor_generator.num_anchors
        ):
            rows, columns = (torch.arange(n, device=x.device) * stride for n in x.shape[-2:])
            found = [(rows < h)[:, None] & (columns < w) for h, w in sizes]
            levels.append(torch.stack(found).flatten(1).repeat_interleave(anchors, dim=1))
        return torch.cat(levels, dim=1)

    def _padded_alone(self, size: Tuple[int, int]) -> Tuple[int, int]:
        """Height and width of a batch of one image of this size."""
        multiple, square = padding(self.backbone)
        height, width = (-(-(square or x) // multiple) * multiple for x in size)
        return height, width
