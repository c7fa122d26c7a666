"""Faster R-CNN that distils from an attached teacher.

Shape shorthand: N images.
"""

from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from .box_distiller import BoxDistiller
from .teacher import Teacher


@META_ARCH_REGISTRY.register()
class CrossKDRCNN(GeneralizedRCNN):
    """:class:`GeneralizedRCNN` that, once a teacher is attached, also returns distillation losses
    in training.

    Without a teacher, in evaluation and export it is its parent, bit for bit; so are its checkpoint
    keys, but for ``fusion.*`` where adapters are learned.

    Attributes:
        teacher: the attached teacher, or None.
        kd_factor: multiplies the distillation losses; 0 doesn't run the teacher. A schedule sets
            it, 1 without one.
    """

    teacher: Optional[Teacher] = None
    kd_factor: float = 1.0
    _distiller: Optional[BoxDistiller] = None

    def set_teacher(self, teacher: Teacher, cfg: CfgNode) -> None:
        """Distil from ``teacher`` as ``cfg`` says; call it through
        :func:`crosskd_ifc.attach_teacher`.

        Raises:
            ConfigError: if student and teacher don't fit each other.
        """
        if cfg.MODEL.CROSSKD.ENABLED:
            self._distiller = BoxDistiller(cfg, self, teacher)
            self.fusion = self._distiller.fusion.to(self.device)
        self.teacher = teacher

    def forward(self, batched_inputs: List[Dict[str, torch.Tensor]]):
        """As the parent's; in training with a teacher the dict also holds ``loss_cls_kd`` and
        ``loss_box_reg_kd``."""
        if not self.training or self._distiller is None:
            return super().forward(batched_inputs)
        with self.roi_heads.record() as trace:
            losses = super().forward(batched_inputs)
        losses.update(self._distiller.losses(batched_inputs, trace, self.kd_factor))
        return losses

    @torch.no_grad()
    def cross_head_inference(self, batched_inputs: List[Dict[str, torch.Tensor]]):
        """What the teacher's head detects in the student's features.

        The student's proposals and taps, then the teacher's remaining layers, predictor and its
        thresholds. For evaluation mode, with a teacher attached.

        Args:
            batched_inputs: as for :meth:`forward`.

        Returns:
            As ``forward`` in evaluation; classes are the teacher's.
        """
        if self._distiller is None:
            raise RuntimeError("cross_head_inference needs a teacher: call attach_teacher first")
        with self.roi_heads.record() as trace:
            self.inference(batched_inputs, do_postprocess=False)
        results = self._distiller.detect(batched_inputs, trace)
        return self._postprocess(results, batched_inputs, [r.image_size for r in results])

    def _apply(self, *args, **kwargs):
        # Called by to(), cuda(), half(), ...: the teacher follows the device, not the precision.
        module = super()._apply(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(self.device)
        return module
