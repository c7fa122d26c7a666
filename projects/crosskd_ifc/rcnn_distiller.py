"""All parts of a two-stage distillation together."""

import contextlib
from typing import Dict, Iterator, List, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances

from .box_distiller import BoxDistiller
from .diagnostics import GradientDiagnostics
from .feature_distiller import FeatureDistiller
from .fusion import FeatureFusion
from .mask_distiller import MaskDistiller
from .pair import build_class_map, check_student, check_teacher
from .rpn import RPNMimic
from .step import Step, TeacherPass, is_logging_step, put_scalars
from .teacher import Teacher


class RCNNDistiller:
    """The distillation losses that a config asks for, computed beside the student's forward."""

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        box: BoxDistiller,
        others: List,
        rpn: Optional[RPNMimic],
        diagnostics: Optional[GradientDiagnostics],
    ):
        """
        Args:
            teacher: the frozen detector.
            box: of the box branch.
            others: more distillers, with ``keys`` and ``losses(step)``.
            rpn: whose loss the student's RPN adds itself.
            diagnostics: measured on all losses of a step.
        """
        self.teacher, self.box, self._others = teacher, box, others
        self._rpn, self._diagnostics = rpn, diagnostics

    @classmethod
    def from_config(cls, cfg: CfgNode, student: GeneralizedRCNN, teacher: Teacher):
        kd = cfg.MODEL.CROSSKD
        own_predictions = kd.MIMIC == "student_head"
        check_student(student, own_predictions=own_predictions)
        check_teacher(teacher)
        has_masks = student.roi_heads.mask_on and kd.LOSS.MASK_WEIGHT > 0
        needed_by = "MODEL.CROSSKD.MIMIC 'student_head'" if own_predictions else ""
        if has_masks and kd.LOSS.MASK_CHANNELS == "ground_truth":
            needed_by = needed_by or "MODEL.CROSSKD.LOSS.MASK_CHANNELS 'ground_truth'"
        class_map = build_class_map(cfg, student, teacher, needed_by)
        box = BoxDistiller(cfg, student, teacher, class_map)
        others: List = []
        if has_masks:
            others.append(MaskDistiller(cfg, student, teacher, class_map))
        if kd.LOSS.FEATURE_WEIGHT > 0:
            others.append(FeatureDistiller(cfg, student, teacher))
        return {
            "teacher": teacher,
            "box": box,
            "others": others,
            "rpn": RPNMimic(cfg, student, teacher) if kd.LOSS.RPN_WEIGHT > 0 else None,
            "diagnostics": (
                GradientDiagnostics(cfg, student, box.fusion)
                if kd.DIAGNOSTICS.GRAD_PERIOD > 0
                else None
            ),
        }

    @property
    def fusion(self) -> Optional[FeatureFusion]:
        """The module with the learned parameters of the cross-head; None without one."""
        return self.box.fusion

    @contextlib.contextmanager
    def recording(
        self,
        student: GeneralizedRCNN,
        batched_inputs: List[Dict[str, torch.Tensor]],
        factor: float,
    ) -> Iterator[Step]:
        """Within this context, the student's next training forward fills the step that it yields.

        Args:
            student: a :class:`GeneralizedRCNN` with :class:`CrossKDROIHeads`.
            batched_inputs: the student's raw images.
            factor: of the schedule.
        """
        log = is_logging_step()
        step = Step(TeacherPass(self.teacher, batched_inputs, timed=log), factor, log)

        def keep_features(module, inputs, output: Dict[str, torch.Tensor]):
            step.features = output

        handle = student.backbone.register_forward_hook(keep_features)
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            step.heads = stack.enter_context(student.roi_heads.record())
            if self._rpn is not None:
                stack.enter_context(student.proposal_generator.mimicking(self._rpn, step))
            yield step

    def losses(self, step: Step) -> Dict[str, torch.Tensor]:
        """The weighted distillation losses of a step, scalars, but for the RPN's.

        With a factor of 0 the teacher isn't run, and all are zeros with a graph to every learned
        parameter of the distillation.
        """
        distillers = [self.box, *self._others]
        if step.factor == 0:
            zero = self.box.zero(step.heads)
            losses = {key: zero for d in distillers for key in d.keys}
        else:
            losses = {}
            for distiller in distillers:
                for key, value in distiller.losses(step).items():
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

    def detect(
        self, student: GeneralizedRCNN, batched_inputs: List[Dict[str, torch.Tensor]]
    ) -> List[Instances]:
        """What the cross-head detects, per image, in the network's pixels; in evaluation mode."""
        with student.roi_heads.record() as trace:
            student.inference(batched_inputs, do_postprocess=False)
        return self.box.detect(TeacherPass(self.teacher, batched_inputs), trace)
