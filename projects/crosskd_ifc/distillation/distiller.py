"""All parts of a distillation together, beside the student's own training forward."""

import contextlib
from typing import Any, ContextManager, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Instances
from torch import nn

from .compatibility.class_map import ClassMap
from .compatibility.two_stage import stage_pairs
from .dense.box import DenseBoxDistiller
from .feature import FeatureDistiller
from .head_layers import record_towers
from .losses import connected_zero
from .teacher import Teacher, TeacherPass
from .traces import HeadTrace, StepTrace, is_logging_step, put_scalars
from .two_stage.box import BoxDistiller, detect
from .two_stage.branches import KeypointDistiller, MaskDistiller
from .two_stage.rpn import RPNMimic

# MODEL.CROSSKD.MIMIC -> for each part that compares predictions whether they are the student's own,
# not the cross-head's.
OWN_PREDICTIONS = {"cross_head": (False,), "student_head": (True,), "both": (False, True)}


@contextlib.contextmanager
def recorded(student: nn.Module, steps: List[StepTrace]) -> Iterator[List[StepTrace]]:
    """Within this context, the student's next training forward fills all these steps."""

    def keep_features(module, inputs, output: Dict[str, torch.Tensor]):
        for step in steps:
            step.features = output

    with student.backbone.register_forward_hook(keep_features), student.record() as heads:
        for step in steps:
            step.heads = heads
        yield steps


class Distiller:
    """The distillation losses that a config asks for, of any student.

    A part has ``keys``, the names of its losses, and ``losses(step)``, which gives them weighted,
    without the schedule's factor. Losses of equal names are added. What a part learns beside the
    box's fusion is its ``adapters``, a module.
    """

    @configurable
    def __init__(self, *, teacher: Teacher, box: Any, others: Sequence[Any]):
        """
        Args:
            teacher: the frozen detector.
            box: the part that compares classes and boxes; also has ``fusion`` and ``zero(trace)``.
            others: more parts.
        """
        self.teacher, self.box = teacher, box
        self._parts: List[Any] = [box, *others]
        self._learned_parts = {
            part.adapters_name: part.adapters
            for part in others
            if any(True for _ in getattr(part, "adapters", nn.Identity()).parameters())
        }

    @property
    def has_cross_head(self) -> bool:
        """Whether the teacher's head reads the student."""
        return self.box.fusion is not None

    @property
    def fusion(self) -> Optional[nn.Module]:
        """The module with the learned parameters of the cross-head; None without one."""
        return self.box.fusion

    @property
    def learned(self) -> Optional[nn.Module]:
        """The module with all learned parameters: those of :attr:`fusion` under their own names,
        those of other parts under the part's; None without a cross-head and such."""
        if not self._learned_parts:
            return self.fusion
        both = nn.Module()
        children = () if self.fusion is None else self.fusion.named_children()
        for name, child in (*children, *self._learned_parts.items()):
            both.add_module(name, child)
        return both

    @contextlib.contextmanager
    def recording(
        self,
        student: nn.Module,
        batched_inputs: List[Dict[str, torch.Tensor]],
        factor: float,
    ) -> Iterator[StepTrace]:
        """Within this context, the student's next training forward fills the step that it yields.

        Args:
            student: whose :meth:`record` hands out what its heads compute.
            batched_inputs: its raw images.
            factor: of the schedule.
        """
        with recorded(student, [self.start(batched_inputs, factor)]) as (step,):
            with self.joining(student, step):
                yield step

    def start(self, batched_inputs: List[Dict[str, torch.Tensor]], factor: float) -> StepTrace:
        """A step whose student hasn't run yet; arguments as of :meth:`recording`."""
        log = is_logging_step()
        teacher = TeacherPass(self.teacher, batched_inputs, timed=log)
        return StepTrace(teacher, batched_inputs, factor, log)

    def joining(self, student: nn.Module, step: StepTrace) -> ContextManager[None]:
        """Within this context, the student's forward adds the losses that are its own to add."""
        return contextlib.nullcontext()

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted distillation losses of a step, scalars.

        With a factor of 0 the teacher isn't run, and all are zeros with a graph to every learned
        parameter of the distillation.
        """
        if step.factor == 0:
            zero = self.box.zero(step.heads)
            parameters = [p for x in self._learned_parts.values() for p in x.parameters()]
            zero = connected_zero(zero, parameters)
            losses = {key: zero for part in self._parts for key in part.keys}
        else:
            found = (part.losses(step) for part in self._parts)
            losses = add_losses({k: v * step.factor for k, v in x.items()} for x in found)
        if step.log:
            put_scalars({"factor": step.factor})
            if step.factor > 0:
                put_scalars({"teacher_seconds": step.teacher.seconds})
        return losses


class BoxStages:
    """Box distillers side by side: of the stages of a Cascade R-CNN student, or of one box head
    that learns from all stages of a Cascade R-CNN. Each has a fusion of its own."""

    def __init__(self, parts: Sequence[BoxDistiller]):
        self.parts = parts
        self.keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
        fusions = {part.stages.name: part.fusion for part in parts if part.fusion is not None}
        self.fusion = nn.ModuleDict(fusions) if fusions else None

    def losses(self, step: StepTrace) -> Dict[str, torch.Tensor]:
        """The weighted losses of one step, scalars; those of equal names added."""
        return add_losses(part.losses(step) for part in self.parts)

    def zero(self, trace: HeadTrace) -> torch.Tensor:
        """0, connected to every learned parameter of the fusions."""
        return sum(part.zero(trace) for part in self.parts)


def add_losses(found: Iterable[Dict[str, torch.Tensor]]) -> Dict[str, torch.Tensor]:
    """All losses; those of equal names added."""
    losses: Dict[str, torch.Tensor] = {}
    for more in found:
        for key, value in more.items():
            losses[key] = losses[key] + value if key in losses else value
    return losses


class RCNNDistiller(Distiller):
    """The distillation of a :class:`GeneralizedRCNN` with :class:`CrossKDROIHeads` or
    :class:`CrossKDCascadeROIHeads`.

    Its losses are without the RPN's, which the student's RPN adds itself.
    """

    @configurable
    def __init__(self, *, rpn: Optional[RPNMimic], **kwargs):
        """
        Args:
            rpn: whose loss the student's RPN adds.
            kwargs: of :class:`Distiller`.
        """
        super().__init__(**kwargs)
        self._rpn = rpn

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        student: GeneralizedRCNN,
        teacher: Teacher,
        class_map: Optional[ClassMap],
    ):
        kd, pair = cfg.MODEL.CROSSKD, (cfg, student, teacher)
        own = OWN_PREDICTIONS[kd.MIMIC]
        stages = stage_pairs(kd, student, teacher)
        boxes = (
            [BoxDistiller(*pair, class_map, stages=s, own_predictions=x) for s in stages]
            for x in own
        )
        box, *others = [BoxStages(x) if len(x) > 1 else x[0] for x in boxes]
        if student.roi_heads.mask_on and kd.LOSS.MASK_WEIGHT > 0:
            others += [MaskDistiller(*pair, class_map, own_predictions=x) for x in own]
        if student.roi_heads.keypoint_on and kd.LOSS.KEYPOINT_WEIGHT > 0:
            others += [KeypointDistiller(*pair, class_map, own_predictions=x) for x in own]
        if kd.LOSS.FEATURE_WEIGHT > 0:
            others.append(FeatureDistiller(*pair))
        return {
            "teacher": teacher,
            "box": box,
            "others": others,
            "rpn": RPNMimic(cfg, student, teacher) if kd.LOSS.RPN_WEIGHT > 0 else None,
        }

    def joining(self, student: GeneralizedRCNN, step: StepTrace) -> ContextManager[None]:
        if self._rpn is None:
            return super().joining(student, step)
        return student.proposal_generator.mimicking(self._rpn, step)

    def detect(
        self, student: GeneralizedRCNN, batched_inputs: List[Dict[str, torch.Tensor]]
    ) -> List[Instances]:
        """What the cross-head detects, per image, in the network's pixels; in evaluation mode."""
        with student.record() as trace:
            student.inference(batched_inputs, do_postprocess=False)
        return detect(self.box.parts, TeacherPass(self.teacher, batched_inputs), trace)


class DenseDistiller(Distiller):
    """The distillation of a RetinaNet or FCOS."""

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student: DenseDetector, teacher: Teacher, class_map: Optional[ClassMap]
    ):
        kd, pair = cfg.MODEL.CROSSKD, (cfg, student, teacher)
        own = OWN_PREDICTIONS[kd.MIMIC]
        box, *others = [DenseBoxDistiller(*pair, class_map, own_predictions=x) for x in own]
        if kd.LOSS.FEATURE_WEIGHT > 0:
            others.append(FeatureDistiller(*pair))
        return {"teacher": teacher, "box": box, "others": others}

    def detect(
        self, student: DenseDetector, batched_inputs: List[Dict[str, torch.Tensor]]
    ) -> List[Instances]:
        """What the cross-head detects, per image, in the network's pixels; in evaluation mode."""
        images = student.preprocess_image(batched_inputs)
        features = student.backbone(images.tensor)
        levels = [features[name] for name in student.head_in_features]
        with record_towers(student.head) as layers:
            student.head(levels)
        theirs, _ = self.box.run_teacher(TeacherPass(self.teacher, batched_inputs))
        found = self.box.mimic.maps(layers, theirs)
        return self.teacher.model.forward_inference(images, levels, found)
