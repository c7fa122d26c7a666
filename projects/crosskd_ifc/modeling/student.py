"""What all students have in common: a teacher, its distillation, an inherited start."""

import contextlib
import logging
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError, error_prefix
from ..distillation.distiller import Distiller
from ..distillation.several import SeveralTeachers
from ..distillation.teacher import Teacher
from ..weights.state_dicts import ADAPTER_PREFIX
from .diagnostics import GradientDiagnostics
from .inheriting import WeightInheritance

logger = logging.getLogger(__name__)


class TeacherCandidate(NamedTuple):
    """A teacher for a student that may refuse it.

    Attributes:
        teacher: the frozen detector.
        cfg: the student's config, as if this were its only teacher.
        load: gives the teacher its weights; called once it is known to fit, since they may be a
            long download.
        name: begins its errors.
    """

    teacher: Teacher
    cfg: CfgNode
    load: Optional[Callable[[], None]] = None
    name: str = ""


class Student(nn.Module):
    """Mixin for a detector that distils once a teacher is attached.

    Put it before the detector's class, and give :meth:`build_distiller`, :meth:`record` and
    :meth:`predictors`.

    Attributes:
        teacher: the attached teacher, the first of several, or None.
        teachers: all of them.
        distiller: computes the distillation losses, or None.
        kd_factor: multiplies the distillation losses; 0 doesn't run the teacher. A schedule sets
            it, 1 without one.
    """

    teacher: Optional[Teacher] = None
    kd_factor: float = 1.0
    teachers: Sequence[Teacher] = ()
    distiller: Optional[Union[Distiller, SeveralTeachers]] = None
    _diagnostics: Optional[GradientDiagnostics] = None
    _inheritance: Optional[WeightInheritance] = None
    _has_fusion = False
    has_distilled = False  # a forward with distillation losses
    _is_looked_at = False  # whether the losses reach a parameter

    def build_distiller(self, cfg: CfgNode, teacher: Teacher) -> Distiller:
        """The distiller that ``cfg`` asks for.

        Raises:
            ConfigError: if student and teacher don't fit each other.
        """
        raise NotImplementedError

    def record(self) -> ContextManager[Any]:
        """Within this context, the next forward fills the trace of the heads that it yields."""
        raise NotImplementedError

    def forward(self, batched_inputs: List[Dict[str, torch.Tensor]]):
        """As the parent's; in training with a teacher the dict also holds the distillation losses,
        whose names end in ``_kd``."""
        if not self.training or self.distiller is None:
            return super().forward(batched_inputs)
        # Once for both networks.
        batched_inputs = [{**x, "image": x["image"].to(self.device)} for x in batched_inputs]
        with self.distiller.recording(self, batched_inputs, self.kd_factor) as step:
            losses = super().forward(batched_inputs)
        found = self.distiller.losses(step)
        losses.update(found)
        self.has_distilled = True
        self._tell_if_nothing_learns(found)
        if self._diagnostics is not None:
            self._diagnostics.measure(losses)
        return losses

    def _tell_if_nothing_learns(self, losses: Dict[str, torch.Tensor]) -> None:
        """Once, where nothing that trains lies before the taps: a frozen backbone, say."""
        if self._is_looked_at or self.kd_factor == 0 or not torch.is_grad_enabled():
            return
        self._is_looked_at = True
        if not any(float(x.detach()) for x in losses.values()):  # all weights are 0, beside INHERIT
            return
        if not self._reaches_the_student(losses):
            logger.warning(
                "The distillation changes nothing: no parameter that trains lies before its taps "
                "(MODEL.CROSSKD.FUSION.IN_FEATURES); take later layers, or freeze less of the "
                "student"
            )

    def _reaches_the_student(self, losses: Dict[str, torch.Tensor]) -> bool:
        found = [x for x in losses.values() if x.requires_grad]
        if not found or not self._has_fusion:  # then all that trains is the student's
            return bool(found)
        learned = {id(x) for x in self.fusion.parameters()}
        ours = [x for x in self.parameters() if x.requires_grad and id(x) not in learned]
        if not ours:
            return False
        try:
            gradients = torch.autograd.grad(sum(found), ours, retain_graph=True, allow_unused=True)
        except RuntimeError:  # activation checkpoints of the older kind can't be asked
            return True
        return any(gradient is not None for gradient in gradients)

    def set_teachers(self, candidates: Sequence[TeacherCandidate], *, loss: str = "mean") -> None:
        """Distil from these teachers; call it through :func:`crosskd_ifc.attach_teacher`.

        Args:
            candidates: one or more; the start is inherited from the first.
            loss: of several, "mean" or "one".

        Raises:
            ConfigError: if student and a teacher don't fit each other.
        """
        cfg, distillers, inheritance = candidates[0].cfg, [], None
        for candidate in candidates if cfg.MODEL.CROSSKD.ENABLED else ():
            with error_prefix(candidate.name):
                distillers.append(self.build_distiller(candidate.cfg, candidate.teacher))
                if inheritance is None and candidate.cfg.MODEL.CROSSKD.INHERIT:
                    inheritance = WeightInheritance(candidate.cfg, self, candidate.teacher)
        distiller = distillers[0] if distillers else None
        if len(distillers) > 1:
            distiller = SeveralTeachers(distillers, loss=loss, seed=max(cfg.SEED, 0))
        learns = distiller is not None and distiller.learned is not None
        if learns and hasattr(self, "fusion") and not self._has_fusion:
            raise ConfigError(
                f"{type(self).__name__}.fusion: this name is for what the distillation learns; "
                "call the student's own module something else"
            )
        for candidate in candidates:
            with error_prefix(candidate.name):
                if candidate.load is not None:
                    candidate.load()
        # All at once: a student that was refused a teacher stays as it was.
        self.teachers = [candidate.teacher for candidate in candidates]
        self.teacher, self._inheritance = self.teachers[0], inheritance
        self.distiller = distiller
        self._diagnostics = self._build_diagnostics(cfg)
        if self._has_fusion:  # of an earlier teacher
            del self.fusion
        self._has_fusion = learns
        if learns:
            self.fusion = distiller.learned.to(self.device).train(self.training)

    @contextlib.contextmanager
    def without_teacher(self) -> Iterator[None]:
        """Within this context, there is no teacher, so that a copy of the student has none."""
        names = ("teacher", "teachers", "distiller", "_diagnostics", "_inheritance")
        held = {name: self.__dict__.pop(name) for name in names if name in self.__dict__}
        try:
            yield
        finally:
            self.__dict__.update(held)

    def predictors(self) -> List[nn.Module]:
        """The modules that predict classes and boxes."""
        raise NotImplementedError

    def _build_diagnostics(self, cfg: CfgNode) -> Optional[GradientDiagnostics]:
        period = cfg.MODEL.CROSSKD.DIAGNOSTICS.GRAD_PERIOD
        if self.distiller is None or period == 0:
            return None
        return GradientDiagnostics(self, self.predictors(), period=period)

    @property
    def has_cross_head(self) -> bool:
        """Whether a teacher is attached whose head reads this student, as ``MIMIC`` decides."""
        return self.distiller is not None and self.distiller.has_cross_head

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
        for teacher in self.teachers:
            teacher.to(self.device)
        return module

    @torch.no_grad()
    def cross_head_inference(self, batched_inputs: List[Dict[str, torch.Tensor]]):
        """What the teacher's head detects in the student's features (of a two-stage detector: in
        the student's proposals), with the teacher's thresholds; for evaluation mode.

        Args:
            batched_inputs: as for ``forward``.

        Returns:
            As ``forward`` in evaluation; classes are the teacher's.
        """
        if not self.has_cross_head:
            raise RuntimeError("it needs an attached teacher, and MIMIC other than student_head")
        results = self.distiller.detect(self, batched_inputs)
        sizes = [r.image_size for r in results]
        return GeneralizedRCNN._postprocess(results, batched_inputs, sizes)


def learned_by_distillation(model: nn.Module) -> Optional[nn.Module]:
    """What a student, or one in a DDP wrapper, has beside its own weights; None if nothing.

    A detector without a teacher may have a ``fusion`` of its own.
    """
    model = unwrap(model)
    return model.fusion if isinstance(model, Student) and model._has_fusion else None


def adapter_prefixes(model: nn.Module) -> Tuple[str, ...]:
    """What the keys of :func:`learned_by_distillation` begin with; () if there are none."""
    return () if learned_by_distillation(model) is None else (ADAPTER_PREFIX,)


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside of DDP and ``torch.compile``, or the model itself."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return getattr(model, "_orig_mod", model)
