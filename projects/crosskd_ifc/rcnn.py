"""Faster and Mask R-CNN that distil from an attached teacher.

Shape shorthand: N images.
"""

from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from .inherit import Inheritance, plan_inheritance
from .rcnn_distiller import RCNNDistiller
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
    _distiller: Optional[RCNNDistiller] = None
    _inheritance: Optional[Inheritance] = None

    def set_teacher(self, teacher: Teacher, cfg: CfgNode) -> None:
        """Distil from ``teacher`` as ``cfg`` says; call it through
        :func:`crosskd_ifc.attach_teacher`.

        Raises:
            ConfigError: if student and teacher don't fit each other.
        """
        distiller = inheritance = None
        if cfg.MODEL.CROSSKD.ENABLED:
            distiller = RCNNDistiller(cfg, self, teacher)
            inheritance = plan_inheritance(cfg, self, teacher)
        # All at once: a student that was refused a teacher stays as it was.
        self.teacher, self._distiller, self._inheritance = teacher, distiller, inheritance
        self._modules.pop("fusion", None)  # of an earlier teacher
        if self.has_cross_head:
            self.fusion = distiller.fusion.to(self.device)

    @property
    def has_cross_head(self) -> bool:
        """Whether a teacher is attached whose head reads this student (``MIMIC`` "cross_head")."""
        return self._distiller is not None and self._distiller.fusion is not None

    def inherit_weights(self) -> None:
        """Start from the teacher's weights, as ``MODEL.CROSSKD.INHERIT`` says.

        Call it once, after ``MODEL.WEIGHTS`` are loaded, and not in a resumed run.
        :class:`CrossKDTrainer` does.
        """
        if self._inheritance is not None:
            self._inheritance.apply()

    def forward(self, batched_inputs: List[Dict[str, torch.Tensor]]):
        """As the parent's; in training with a teacher the dict also holds the distillation losses,
        whose names end in ``_kd``."""
        if not self.training or self._distiller is None:
            return super().forward(batched_inputs)
        with self._distiller.recording(self, batched_inputs, self.kd_factor) as step:
            losses = super().forward(batched_inputs)
        losses.update(self._distiller.losses(step))
        self._distiller.diagnose(losses)
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
        if not self.has_cross_head:
            raise RuntimeError("without an attached teacher (MIMIC cross_head) there is none")
        results = self._distiller.detect(self, batched_inputs)
        return self._postprocess(results, batched_inputs, [r.image_size for r in results])

    def _apply(self, *args, **kwargs):
        # Called by to(), cuda(), half(), ...: the teacher follows the device, not the precision.
        module = super()._apply(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(self.device)
        return module
