"""Whether a two-stage student and teacher fit each other, and how their classes correspond."""

import logging
from typing import List, NamedTuple, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from torch import nn

from ...config import ConfigError, fusion_name
from ..fusion import FeatureFusion
from ..head_layers import BoxHeadLayers, box_stages, own_method
from ..teacher import Teacher
from .fusions import make_fusion
from .settings import check_unused

logger = logging.getLogger(__name__)

_NO_ONE_HEAD = {
    Res5ROIHeads: (
        "no box head but a stage of its backbone, which has no layers to enter; train a teacher "
        "with a StandardROIHeads on the same backbone (ROI_HEADS.NAME, ROI_BOX_HEAD.NAME "
        "FastRCNNConvFCHead)"
    ),
}


class StagePair(NamedTuple):
    """A box head of the student and the one of the teacher that it learns from.

    Attributes:
        student, teacher: their places, 0 for the first or only one.
        share: of the losses' weights.
        name: such as "stage0"; "" for the only pair.
        suffix: of the losses' names, as detectron2 names the student's own.
    """

    student: int
    teacher: int
    share: float = 1.0
    name: str = ""
    suffix: str = ""


def stage_pairs(crosskd: CfgNode, student: nn.Module, teacher: Teacher) -> List[StagePair]:
    """Which box heads learn from which: those of a Cascade R-CNN from the teacher's of the same
    stage, or from its only one; the only one of another student from all, or from the one that
    ``TEACHER.STAGE`` names.

    Args:
        crosskd: the node MODEL.CROSSKD.

    Raises:
        ConfigError: for a stage that isn't there, or an unlike number of stages.
    """
    stage, key = crosskd.TEACHER.STAGE, "MODEL.CROSSKD.TEACHER.STAGE"
    ours, theirs = (len(box_stages(m.roi_heads)) for m in (student, teacher.model))
    if ours > 1:
        if stage is not None:
            raise ConfigError(
                f"{key} is {stage!r}, but the student is a Cascade R-CNN, each of whose stages "
                "learns from the teacher's of the same number; set it to its default, null"
            )
        if theirs not in (1, ours):
            raise ConfigError(
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS: the student has {ours} stages and the teacher "
                f"({teacher.description}) {theirs}; make them equal, or take a teacher with one"
            )
        names = [f"stage{k}" for k in range(ours)]
        return [
            StagePair(k, k if theirs > 1 else 0, name=name, suffix=f"_{name}")
            for k, name in enumerate(names)
        ]
    if stage in (None, "mean") and theirs > 1:
        return [StagePair(0, k, share=1 / theirs, name=f"stage{k}") for k in range(theirs)]
    stage = 1 if stage is None else stage
    if type(stage) is not int or not 1 <= stage <= theirs:
        has = f"the stages 1 to {theirs}, and 'mean' for all" if theirs > 1 else "one box head: 1"
        raise ConfigError(f"{key} is {stage!r}; the teacher ({teacher.description}) has {has}")
    return [StagePair(0, stage - 1)]


def check_pair(student: nn.Module, teacher: Teacher, *, own_predictions: bool) -> None:
    """Refuse a student whose box heads can't be recorded, and a teacher without such that can be
    entered.

    Args:
        student: a :class:`GeneralizedRCNN`.
        own_predictions: whether its own box predictions are to mimic the teacher's.

    Raises:
        ConfigError: with the reason.
    """
    heads = student.roi_heads
    if not hasattr(heads, "record"):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME: the student's ROI heads are {type(heads).__name__}, which "
            "don't hand out their layers; use CrossKDROIHeads or CrossKDCascadeROIHeads"
        )
    try:
        ours = box_stages(heads)
    except TypeError as error:
        raise ConfigError(f"MODEL.ROI_BOX_HEAD.NAME: the student's {error}") from None
    if len({id(stage.head) for stage in ours}) < len(ours):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME: {type(heads).__name__} of the student runs one box head in "
            "several stages, whose layers can't be told apart; give each a head of its own"
        )
    for stage in ours:
        problem = _predictor_problem(stage.predictor)
        if problem and (own_predictions or not isinstance(stage.predictor, FastRCNNOutputLayers)):
            raise ConfigError(f"MODEL.ROI_BOX_HEAD: the student {problem}")
    _check_teacher(teacher)
    predictors = ours[0].predictor, box_stages(teacher.model.roi_heads)[0].predictor
    sigmoids = [p.use_sigmoid_ce for p in predictors]
    if own_predictions and sigmoids[0] != sigmoids[1]:
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is {sigmoids[0]} for the student and {sigmoids[1]} "
            f"for the teacher ({teacher.description}): probabilities of their own and such that "
            "add up to 1 can't be compared; make them equal, or MODEL.CROSSKD.MIMIC 'cross_head'"
        )


def _check_teacher(teacher: Teacher) -> None:
    model = teacher.model
    if not isinstance(model, GeneralizedRCNN):
        refuse_teacher(
            teacher, f"is a {type(model).__name__}; a two-stage student needs a GeneralizedRCNN"
        )
    heads = model.roi_heads
    for kind, reason in _NO_ONE_HEAD.items():
        if isinstance(heads, kind):
            refuse_teacher(teacher, f"has {type(heads).__name__}: {reason}")
    if not isinstance(heads, StandardROIHeads):
        refuse_teacher(
            teacher, f"has {type(heads).__name__}; its ROI heads must be StandardROIHeads"
        )
    method = own_method(heads, "_forward_box", "_run_stage")
    if method:
        refuse_teacher(
            teacher,
            f"has {type(heads).__name__} with a {method} of their own, so what they predict isn't "
            "known from their layers; its ROI heads must be StandardROIHeads or CascadeROIHeads",
        )
    try:
        problems = [_predictor_problem(stage.predictor) for stage in box_stages(heads)]
    except TypeError as error:
        refuse_teacher(teacher, f"can't be entered: {error}")
    for problem in filter(None, problems):
        refuse_teacher(teacher, problem)


def check_sigmoid_settings(cfg: CfgNode) -> None:
    """Refuse settings of softmax classifiers.

    Raises:
        ConfigError: naming the key.
    """
    reason = "the teacher classifies with sigmoids (USE_SIGMOID_CE): the loss is quality focal"
    check_unused(cfg.MODEL.CROSSKD, ("LOSS.CLS_TYPE", "LOSS.CLS_OPTS", "LOSS.TEMPERATURE"), reason)


def refuse_teacher(teacher: Teacher, reason: str) -> None:
    """Raises: ConfigError: that the teacher doesn't fit, for this reason."""
    raise ConfigError(
        f"MODEL.CROSSKD.TEACHER.CONFIG_FILE: the teacher ({teacher.description}) {reason}"
    )


def _predictor_problem(predictor: nn.Module) -> str:
    if not isinstance(predictor, FastRCNNOutputLayers):
        return f"has a {type(predictor).__name__}; its box predictor must be FastRCNNOutputLayers"
    if type(predictor.box2box_transform) is not Box2BoxTransform:
        kind = type(predictor.box2box_transform).__name__
        return f"encodes boxes by {kind}; Box2BoxTransform (axis-aligned deltas) is needed"
    return ""


def build_fusion(cfg: CfgNode, ours: BoxHeadLayers, theirs: BoxHeadLayers) -> FeatureFusion:
    """The fusion of a box head.

    Args:
        cfg: the student's config.
        ours, theirs: the layers of student and teacher.

    Raises:
        ConfigError: naming the key.
    """
    kd, name = cfg.MODEL.CROSSKD.FUSION, fusion_name(cfg)
    taps = tuple(kd.IN_FEATURES) or _default_taps(name, ours, theirs)
    entry, align = kd.ENTRY or theirs.last, kd.ALIGN or "none"
    return make_fusion(cfg, taps, entry, align, ours, theirs, head="box head")


def _default_taps(fusion: str, ours: BoxHeadLayers, theirs: BoxHeadLayers) -> Tuple[str, ...]:
    if fusion != "none":
        return "fc1", "fc2"
    both = [name for name in ours.names[1:] if name in theirs.names]
    return ("pool", *([name for name in both if name.startswith("fc")] or both[-1:]))
