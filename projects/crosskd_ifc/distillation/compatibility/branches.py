"""Whether the mask or keypoint branches of two detectors fit each other."""

from typing import List, Tuple

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import (
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
)
from torch import nn

from ...config import ConfigError
from ..fusion import build_adapter
from ..head_layers import own_method
from ..teacher import Teacher

# How an ROIPooler assigns boxes to levels; its RoIAlign layers show the rest in their repr.
_POOLER_SETTINGS = (
    "output_size",
    "min_level",
    "max_level",
    "canonical_level",
    "canonical_box_size",
)
# Branch -> the class whose forward its head must have, and one that has it.
_HEADS = {
    "mask": (BaseMaskRCNNHead, "MaskRCNNConvUpsampleHead"),
    "keypoint": (BaseKeypointRCNNHead, "KRCNNConvDeconvUpsampleHead"),
}


def _refuse(branch: str, reason: str) -> None:
    raise ConfigError(f"MODEL.CROSSKD.LOSS.{branch.upper()}_WEIGHT: {reason}; set it to 0.0")


def check_heads(branch: str, student: GeneralizedRCNN, teacher: Teacher) -> None:
    """Refuse a teacher without the branch ("mask", "keypoint"), and heads of another kind.

    Raises:
        ConfigError: with the reason.
    """
    ours, theirs = student.roi_heads, teacher.model.roi_heads
    if not getattr(theirs, f"{branch}_on"):
        key = f"MODEL.{branch.upper()}_ON"
        _refuse(branch, f"the teacher ({teacher.description}) has no {branch} head ({key} False)")
    method = own_method(theirs, f"_forward_{branch}")
    if method:
        _refuse(
            branch,
            f"the teacher ({teacher.description}) has {type(theirs).__name__} with a {method} of "
            "their own, so what they predict isn't known from their layers",
        )
    base, example = _HEADS[branch]
    for whose, heads in (("student", ours), ("teacher", theirs)):
        kind = type(getattr(heads, f"{branch}_head"))
        is_known = getattr(kind, "forward", None) is base.forward
        if not is_known or getattr(heads, f"{branch}_pooler") is None:
            _refuse(
                branch,
                f"the {whose}'s {kind.__name__} predicts {branch}s in its own way; {branch} heads "
                f"must be {base.__name__}, such as {example}",
            )


def check_same_masks(student: GeneralizedRCNN, teacher: Teacher, channels: str) -> None:
    """For the student's own masks: the same size, and channels that correspond.

    Raises:
        ConfigError: with the reason.
    """
    heads: List[nn.Module] = [student.roi_heads, teacher.model.roi_heads]
    for name, h in zip(("student", "teacher"), heads):
        if not isinstance(h.mask_head, MaskRCNNConvUpsampleHead):
            _refuse("mask", f"MIMIC 'student_head' needs a MaskRCNNConvUpsampleHead in the {name}")
    _check_same_size("mask", student, teacher)
    counts = [h.mask_head.predictor.out_channels for h in heads]
    agnostic = [count == 1 < h.num_classes for count, h in zip(counts, heads)]
    if agnostic[0] != agnostic[1] and channels == "all" and counts != [1, 1]:
        raise ConfigError(
            "MODEL.CROSSKD.LOSS.MASK_CHANNELS 'all' can't compare masks per class with "
            "class-agnostic ones (MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK); use 'ground_truth'"
        )


def check_same_points(student: GeneralizedRCNN, teacher: Teacher) -> None:
    """For the student's own heatmaps: the same keypoints and size.

    Raises:
        ConfigError: with the reason.
    """
    _check_same_size("keypoint", student, teacher)
    counts = [m.roi_heads.keypoint_head.num_keypoints for m in (student, teacher.model)]
    if counts[0] != counts[1]:
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS: the student has {counts[0]} keypoints and the "
            f"teacher ({teacher.description}) {counts[1]}; MIMIC 'student_head' needs the same"
        )


def _check_same_size(branch: str, student: GeneralizedRCNN, teacher: Teacher) -> None:
    sizes = [getattr(m.roi_heads, f"{branch}_pooler").output_size for m in (student, teacher.model)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"MODEL.ROI_{branch.upper()}_HEAD.POOLER_RESOLUTION: the student's {branch}s are made "
            f"from {sizes[0]} and the teacher's ({teacher.description}) from {sizes[1]}; MIMIC "
            "'student_head' needs equal sizes"
        )


def check_pyramids(
    branch: str, student: GeneralizedRCNN, teacher: Teacher
) -> Tuple[bool, nn.Module]:
    """For the cross-head: levels of the same names and strides.

    Returns:
        Whether both poolers do the same, and the map from the student's channels to the teacher's.

    Raises:
        ConfigError: with the reason.
    """
    names = getattr(teacher.model.roi_heads, f"{branch}_in_features")
    ours, theirs = student.backbone.output_shape(), teacher.model.backbone.output_shape()
    for name in names:
        found = ours[name].stride if name in ours else None
        wanted = theirs[name].stride
        if found != wanted:
            _refuse(
                branch,
                f"the teacher's {branch} head ({teacher.description}) reads {name} with stride "
                f"{wanted}, the student has {found or 'no such feature'}",
            )
    counts = [{s[n].channels for n in names} for s in (ours, theirs)]
    if any(len(c) > 1 for c in counts):
        levels = ", ".join(names)
        _refuse(branch, f"the levels {levels} have unlike channels, {counts[0] | counts[1]}")
    poolers = [getattr(m.roi_heads, f"{branch}_pooler") for m in (student, teacher.model)]
    size = tuple(poolers[1].output_size)
    adapter = build_adapter(*((c.pop(), *size) for c in counts))
    same = (
        getattr(student.roi_heads, f"{branch}_in_features") == names
        and all(getattr(poolers[0], a) == getattr(poolers[1], a) for a in _POOLER_SETTINGS)
        and repr(poolers[0]) == repr(poolers[1])
    )
    return same, adapter
