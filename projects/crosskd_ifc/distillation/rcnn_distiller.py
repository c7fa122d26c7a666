"""All parts of a two-stage distillation together."""

import contextlib
from typing import Dict, Iterator, List, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import nn

from ..modeling.diagnostics import GradientDiagnostics, pyramid_outputs
from ..modeling.rpn import RPNMimic
from .box import BoxDistiller
from .compatibility.two_stage import build_class_map, check_student, check_teacher
from .distiller import Distiller
from .feature import FeatureDistiller
from .fusion import FeatureFusion
from .mask import MaskDistiller
from .teacher import Teacher
from .traces import Step, TeacherPass


class RCNNDistiller(Distiller):
    """The distillation of a :class:`GeneralizedRCNN` with :class:`CrossKDROIHeads`.

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
            "diagnostics": GradientDiagnostics.build(
                cfg, _shared_parameters(student, box), student.roi_heads.box_predictor
            ),
        }

    @contextlib.contextmanager
    def recording(
        self,
        student: GeneralizedRCNN,
        batched_inputs: List[Dict[str, torch.Tensor]],
        factor: float,
    ) -> Iterator[Step]:
        with contextlib.ExitStack() as stack:
            step = stack.enter_context(super().recording(student, batched_inputs, factor))
            if self._rpn is not None:
                stack.enter_context(student.proposal_generator.mimicking(self._rpn, step))
            yield step

    def detect(
        self, student: GeneralizedRCNN, batched_inputs: List[Dict[str, torch.Tensor]]
    ) -> List[Instances]:
        """What the cross-head detects, per image, in the network's pixels; in evaluation mode."""
        with student.record() as trace:
            student.inference(batched_inputs, do_postprocess=False)
        return self.box.detect(TeacherPass(self.teacher, batched_inputs), trace)


def _shared_parameters(student: GeneralizedRCNN, box: BoxDistiller) -> List[nn.Parameter]:
    """Of the last layer that detection and distillation both reach."""
    layers = student.roi_heads.box_head_layers()
    fusion: Optional[FeatureFusion] = box.fusion
    deepest = layers.last if fusion is None else max(fusion.taps, key=layers.depth)
    if deepest != "pool" and box.is_active:
        return layers.parameters(deepest)
    return pyramid_outputs(student)
