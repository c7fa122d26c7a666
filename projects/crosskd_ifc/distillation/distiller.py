"""All parts of a distillation together, beside the student's own training forward."""

import contextlib
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from torch import nn

from ..modeling.diagnostics import GradientDiagnostics
from .teacher import Teacher
from .traces import Step, TeacherPass, is_logging_step, put_scalars


class Distiller:
    """The distillation losses that a config asks for, of any student.

    A part has ``keys``, the names of its losses, and ``losses(step)``, which gives them weighted,
    without the schedule's factor.
    """

    def __init__(
        self,
        *,
        teacher: Teacher,
        box: Any,
        others: Sequence[Any] = (),
        diagnostics: Optional[GradientDiagnostics] = None,
    ):
        """
        Args:
            teacher: the frozen detector.
            box: the part that compares classes and boxes; also has ``fusion`` and ``zero(trace)``.
            others: more parts.
            diagnostics: measured on all losses of a step.
        """
        self.teacher, self.box = teacher, box
        self._parts: List[Any] = [box, *others]
        self._diagnostics = diagnostics

    @property
    def fusion(self) -> Optional[nn.Module]:
        """The module with the learned parameters of the cross-head; None without one."""
        return self.box.fusion

    @contextlib.contextmanager
    def recording(
        self,
        student: nn.Module,
        batched_inputs: List[Dict[str, torch.Tensor]],
        factor: float,
    ) -> Iterator[Step]:
        """Within this context, the student's next training forward fills the step that it yields.

        Args:
            student: whose :meth:`record` hands out what its heads compute.
            batched_inputs: its raw images.
            factor: of the schedule.
        """
        log = is_logging_step()
        step = Step(TeacherPass(self.teacher, batched_inputs, timed=log), factor, log)

        def keep_features(module, inputs, output: Dict[str, torch.Tensor]):
            step.features = output

        handle = student.backbone.register_forward_hook(keep_features)
        try:
            with student.record() as step.heads:
                yield step
        finally:
            handle.remove()

    def losses(self, step: Step) -> Dict[str, torch.Tensor]:
        """The weighted distillation losses of a step, scalars.

        With a factor of 0 the teacher isn't run, and all are zeros with a graph to every learned
        parameter of the distillation.
        """
        if step.factor == 0:
            zero = self.box.zero(step.heads)
            losses = {key: zero for part in self._parts for key in part.keys}
        else:
            losses = {}
            for part in self._parts:
                for key, value in part.losses(step).items():
                    losses[key] = value * step.factor
        if step.log:
            put_scalars({"factor": step.factor})
            if step.factor > 0:
                put_scalars({"teacher_seconds": step.teacher.seconds})
        return losses

    def diagnose(self, losses: Dict[str, torch.Tensor]) -> None:
        """Measure what the config asks for on all losses of a step, those of detection included."""
        if self._diagnostics is not None:
            self._diagnostics.measure(losses)
