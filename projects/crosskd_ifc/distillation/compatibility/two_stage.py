"""Whether a two-stage student and teacher fit each other, and how their classes correspond."""

import logging
from typing import Tuple

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from torch import nn

from ...config import ConfigError
from ..fusion import FeatureFusion
from ..head_layers import BoxHeadLayers, NamedLayers
from ..teacher import Teacher

logger = logging.getLogger(__name__)

_NO_ONE_HEAD = {
    Res5ROIHeads: (
        "no box head but a stage of its backbone, which has no layers to enter; train a teacher "
        "with a StandardROIHeads on the same backbone (ROI_HEADS.NAME, ROI_BOX_HEAD.NAME "
        "FastRCNNConvFCHead)"
    ),
}


def check_student(student: nn.Module, *, own_predictions: bool) -> None:
    """Refuse a student whose head can't be recorded.

    Args:
        student: a :class:`GeneralizedRCNN`.
        own_predictions: whether its own box predictions are to mimic the teacher's.

    Raises:
        ConfigError: with the reason.
    """
    heads = student.roi_heads
    if not hasattr(heads, "box_head_layers"):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME: the student's ROI heads are {type(heads).__name__}, which "
            "don't hand out their layers; use CrossKDROIHeads"
        )
    try:
        heads.box_head_layers()
    except TypeError as error:
        raise ConfigError(f"MODEL.ROI_BOX_HEAD.NAME: the student's {error}") from None
    is_known = isinstance(heads.box_predictor, FastRCNNOutputLayers)
    problem = _predictor_problem(heads.box_predictor)
    if problem and (own_predictions or not is_known):
        raise ConfigError(f"MODEL.ROI_BOX_HEAD: the student {problem}")


def check_teacher(teacher: Teacher) -> None:
    """Refuse a teacher without one box head that gives softmax scores and box deltas.

    Raises:
        ConfigError: with the reason.
    """
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
    stages = len(heads.box_head) if isinstance(heads, CascadeROIHeads) else 1
    if not 1 <= teacher.stage <= stages:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.STAGE is {teacher.stage}; the teacher ({teacher.description}) "
            f"has {f'the stages 1 to {stages}' if stages > 1 else 'one box head: set it to 1'}"
        )
    problem = _predictor_problem(teacher.box_predictor)
    if problem:
        refuse_teacher(teacher, problem)
    try:
        BoxHeadLayers(teacher.box_head, heads.box_pooler.output_size)
    except TypeError as error:
        refuse_teacher(teacher, f"can't be entered: {error}")


def refuse_teacher(teacher: Teacher, reason: str) -> None:
    """Raises: ConfigError: that the teacher doesn't fit, for this reason."""
    raise ConfigError(
        f"MODEL.CROSSKD.TEACHER.CONFIG_FILE: the teacher ({teacher.description}) {reason}"
    )


def _predictor_problem(predictor: nn.Module) -> str:
    if not isinstance(predictor, FastRCNNOutputLayers):
        return f"has a {type(predictor).__name__}; its box predictor must be FastRCNNOutputLayers"
    if predictor.use_sigmoid_ce:
        return "classifies with sigmoids (USE_SIGMOID_CE); the losses compare softmax probabilities"
    if type(predictor.box2box_transform) is not Box2BoxTransform:
        kind = type(predictor.box2box_transform).__name__
        return f"encodes boxes by {kind}; Box2BoxTransform (axis-aligned deltas) is needed"
    return ""


def build_fusion(crosskd: CfgNode, student: nn.Module, teacher: Teacher) -> FeatureFusion:
    """Check taps, entry and route against both box heads and build the fusion.

    Args:
        crosskd: the node MODEL.CROSSKD.

    Raises:
        ConfigError: naming the key.
    """
    kd, heads = crosskd.FUSION, teacher.model.roi_heads
    ours = student.roi_heads.box_head_layers()
    theirs = BoxHeadLayers(teacher.box_head, heads.box_pooler.output_size)
    taps = tuple(kd.IN_FEATURES) or ("fc1", "fc2")
    entry = kd.ENTRY or theirs.last
    _check_layers("IN_FEATURES", taps, ours, "student")
    _check_layers("ENTRY", (entry,), theirs, "teacher")
    if kd.ROUTE == "through":
        _check_layers("IN_FEATURES", taps, theirs, "teacher (route 'through')")
        check_route(taps, entry, theirs)
    return make_fusion(crosskd, taps, entry, kd.ROUTE, kd.ALIGN or "none", ours, theirs)


def check_route(taps: Tuple[str, ...], entry: str, theirs: NamedLayers) -> None:
    """Refuse taps behind the entry, for the route "through".

    Raises:
        ConfigError: naming them.
    """
    deeper = [tap for tap in taps if theirs.depth(tap) > theirs.depth(entry)]
    if deeper:
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.IN_FEATURES: {deeper} lie deeper than ENTRY '{entry}', so "
            "route 'through' has no teacher layers to run; take taps from "
            f"{theirs.names[: theirs.depth(entry) + 1]}, or ROUTE direct"
        )


def make_fusion(
    crosskd: CfgNode,
    taps: Tuple[str, ...],
    entry: str,
    route: str,
    align: str,
    ours: NamedLayers,
    theirs: NamedLayers,
) -> FeatureFusion:
    """A fusion from layers of the student to one of the teacher.

    Args:
        crosskd: the node MODEL.CROSSKD.
        taps, entry, route, align: as of :class:`FeatureFusion`.
        ours, theirs: the layers of student and teacher.

    Raises:
        ConfigError: if the shapes can't be bridged, the fusion refuses the taps, or weights or
            detached taps don't fit them.
    """
    kd, loss = crosskd.FUSION, crosskd.LOSS
    if loss.TAP_WEIGHTS and len(loss.TAP_WEIGHTS) != len(taps):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TAP_WEIGHTS is {tuple(loss.TAP_WEIGHTS)}, but FUSION.IN_FEATURES "
            f"has {len(taps)} taps, {taps}; give one weight for each, or ()"
        )
    if not set(kd.DETACH) <= set(taps) or set(kd.DETACH) == set(taps):
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.DETACH is {tuple(kd.DETACH)}; it must name some, not all, of "
            f"the taps {taps}"
        )
    try:
        return FeatureFusion(
            fused_weight=loss.FUSED_WEIGHT,
            tap_weights=loss.TAP_WEIGHTS,
            detach=kd.DETACH,
            name=kd.NAME,
            taps=taps,
            entry=entry,
            route=route,
            align=align,
            student_shapes=ours.shapes,
            teacher_shapes=theirs.shapes,
        )
    except ValueError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION (NAME '{kd.NAME}', IN_FEATURES {taps}, ENTRY '{entry}'): {error}"
        ) from None


def _check_layers(key: str, names: Tuple[str, ...], layers: BoxHeadLayers, whose: str) -> None:
    for name in names:
        if name not in layers.names:
            raise ConfigError(
                f"MODEL.CROSSKD.FUSION.{key}: the {whose} box head has no layer {name!r}; it has "
                f"{', '.join(layers.names)}"
            )
