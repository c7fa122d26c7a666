"""What all students have in common: a teacher, its distillation, an inherited start."""

from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from torch import nn

from .inherit import Inheritance, plan_inheritance
from .teacher import Teacher


class Student(nn.Module):
    """Mixin for a detector that distils once a teacher is attached.

    Put it before the detector's class, and give :meth:`build_distiller`.

    Attributes:
        teacher: the attached teacher, or None.
        kd_factor: multiplies the distillation losses; 0 doesn't run the teacher. A schedule sets
            it, 1 without one.
    """

    teacher: Optional[Teacher] = None
    kd_factor: float = 1.0
    _distiller: Any = None
    _inheritance: Optional[Inheritance] = None

    def build_distiller(self, cfg: CfgNode, teacher: Teacher):
        """The distiller that ``cfg`` asks for; its ``fusion`` is a module with the learned
        parameters of the cross-head, or None without one.

        Raises:
            ConfigError: if student and teacher don't fit each other.
        """
        raise NotImplementedError

    def set_teacher(self, teacher: Teacher, cfg: CfgNode) -> None:
        """Distil from ``teacher`` as ``cfg`` says; call it through
        :func:`crosskd_ifc.attach_teacher`.

        Raises:
            ConfigError: if student and teacher don't fit each other.
        """
        distiller = inheritance = None
        if cfg.MODEL.CROSSKD.ENABLED:
            distiller = self.build_distiller(cfg, teacher)
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

    def _apply(self, *args, **kwargs):
        # Called by to(), cuda(), half(), ...: the teacher follows the device, not the precision.
        module = super()._apply(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(self.device)
        return module

    def _check_cross_head(self) -> None:
        if not self.has_cross_head:
            raise RuntimeError("without an attached teacher (MIMIC cross_head) there is none")

    @torch.no_grad()
    def cross_head_inference(self, batched_inputs):
        """What the teacher's head detects in the student's features; for evaluation mode.

        Args:
            batched_inputs: as for ``forward``.

        Returns:
            As ``forward`` in evaluation; classes are the teacher's.
        """
        raise NotImplementedError
