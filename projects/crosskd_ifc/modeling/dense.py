"""Dense students: their training forward is recorded for the distillation.

Shape shorthand: N images, R anchors of an image over all levels.
"""

import contextlib
from typing import Iterator, List, Optional, Type

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList
from torch import nn

from ..distillation.compatibility.dense import check_pair, check_settings
from ..distillation.distiller import DenseDistiller
from ..distillation.head_layers import record_towers
from ..distillation.teacher import Teacher
from ..distillation.traces import DenseTrace
from .classes import build_class_map, needs_class_map
from .student import Student


class DenseStudent(Student):
    """Mixin for a RetinaNet or FCOS; without a teacher and in evaluation it is its parent, bit for
    bit.

    Attributes:
        stock_class: what its teacher must be.
        kd_depth: of the taps ``conv1`` to ``conv<kd_depth>`` that are combined by default.
        kd_box_type: box loss by default.
    """

    stock_class: Type[DenseDetector]
    kd_depth: int
    kd_box_type: str
    _trace: Optional[DenseTrace] = None

    def build_distiller(self, cfg: CfgNode, teacher: Teacher) -> DenseDistiller:
        check_settings(cfg)
        check_pair(self, teacher)
        class_map = build_class_map(cfg, self, teacher, needs_class_map(cfg))
        return DenseDistiller(cfg, self, teacher, class_map)

    def predictors(self) -> List[nn.Module]:
        return [self.head.cls_score, self.head.bbox_pred]

    def kd_normalizer(self, trace: DenseTrace) -> torch.Tensor:
        """The divisor of the distillation losses, a scalar of at least 1."""
        raise NotImplementedError

    def positives(self, trace: DenseTrace) -> torch.Tensor:
        """(N, R) whether an anchor is matched to an object."""
        return (trace.labels >= 0) & (trace.labels != self.num_classes)

    @contextlib.contextmanager
    def record(self) -> Iterator[DenseTrace]:
        """Within this context, the next forward fills the trace that it yields."""
        with record_towers(self.head) as layers:
            self._trace = DenseTrace(layers, self.head.bbox_pred.out_channels // 4)
            try:
                yield self._trace
            finally:
                self._trace = None

    def inside(self, images: ImageList, features: List[torch.Tensor]) -> Optional[torch.Tensor]:
        """(N, R) whether an anchor may distil; None: all may.

        Args:
            images: the padded batch.
            features: the levels that the head reads, each (N, C, Hi, Wi).
        """
        return None

    def forward_training(
        self, images: ImageList, features: List[torch.Tensor], predictions, gt_instances
    ):
        """The parent's; in a recorded forward it is kept which anchors may distil."""
        if self._trace is not None:
            self._trace.inside = self.inside(images, features)
        return super().forward_training(images, features, predictions, gt_instances)

    def losses(self, anchors: List[Boxes], pred_logits, gt_labels, pred_deltas, gt_boxes, *more):
        """The parent's; in a recorded forward labels and predictions are kept."""
        if self._trace is not None:
            self._trace.anchors, self._trace.boxes = anchors, gt_boxes
            self._trace.labels = torch.stack(gt_labels)
            self._trace.predictions = pred_logits, pred_deltas
        return super().losses(anchors, pred_logits, gt_labels, pred_deltas, gt_boxes, *more)
