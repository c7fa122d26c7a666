"""Whether a two-stage student and teacher fit each other, and how their classes correspond."""

import logging
from typing import Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from torch import nn

from ...config import ConfigError, class_count
from ...data.cards import register_cards
from ...modeling.roi_heads import CrossKDROIHeads
from ..fusion import FeatureFusion
from ..head_layers import BoxHeadLayers, NamedLayers
from ..teacher import Teacher
from . import class_map
from .class_map import ClassMap

logger = logging.getLogger(__name__)

_NO_ONE_HEAD = {
    CascadeROIHeads: (
        "three box heads in a row, each on boxes that the one before has moved: there is no one "
        "prediction for the student's RoIs to mimic"
    ),
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
    if not isinstance(heads, CrossKDROIHeads):
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
        refuse(teacher, f"is a {type(model).__name__}; a two-stage student needs a GeneralizedRCNN")
    heads = model.roi_heads
    for kind, reason in _NO_ONE_HEAD.items():
        if isinstance(heads, kind):
            refuse(teacher, f"has {type(heads).__name__}: {reason}")
    if not isinstance(heads, StandardROIHeads):
        refuse(teacher, f"has {type(heads).__name__}; its ROI heads must be StandardROIHeads")
    problem = _predictor_problem(heads.box_predictor)
    if problem:
        refuse(teacher, problem)
    try:
        BoxHeadLayers(heads.box_head, heads.box_pooler.output_size)
    except TypeError as error:
        refuse(teacher, f"can't be entered: {error}")


def refuse(teacher: Teacher, reason: str) -> None:
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


def build_class_map(
    cfg: CfgNode, student: nn.Module, teacher: Teacher, needed_by: str = ""
) -> Optional[ClassMap]:
    """The map that ``TEACHER.CLASS_MAP`` means; None for a teacher of other classes.

    Args:
        cfg: the student's config.
        needed_by: what compares predictions class by class, "" if nothing does.

    Raises:
        ConfigError: if no map can be made of it.
    """
    ours, theirs = num_classes(student), num_classes(teacher.model)
    kd = cfg.MODEL.CROSSKD.TEACHER
    is_index = class_map.parse(kd.CLASS_MAP)[0] == "index"
    if kd.EVAL_AT_START and is_index:
        needed_by = needed_by or "MODEL.CROSSKD.TEACHER.EVAL_AT_START"
    wants_names = bool(needed_by) or class_map.reads_names(kd.CLASS_MAP)
    names = tuple(class_names(c, load=wants_names) for c in (cfg, teacher.cfg))
    try:
        found = class_map.resolve(
            kd.CLASS_MAP, num_classes=(ours, theirs), names=names, needed_by=needed_by
        )
    except ValueError as error:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CLASS_MAP: {error} (student: {class_count(cfg)[0]} "
            f"{ours}; teacher: {teacher.description})"
        ) from None
    if is_index and needed_by and None in names:
        whose = " and ".join(w for w, n in zip(("the student's", "the teacher's"), names) if not n)
        logger.warning(
            f"MODEL.CROSSKD.TEACHER.CLASS_MAP (): the names of {whose} classes aren't known, so "
            f"they couldn't be compared; {needed_by} takes both to have the same order"
        )
    if kd.EVAL_AT_START and (found is None or not found.is_identity):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.EVAL_AT_START True needs a teacher of the student's {ours} "
            f"classes in the same order, this one ({teacher.description}) has {theirs} of its own; "
            "set it to False"
        )
    return found


def num_classes(model: nn.Module) -> int:
    """Foreground classes of a two-stage or dense detector."""
    return getattr(model, "roi_heads", model).num_classes


def class_names(cfg: Optional[CfgNode], *, load: bool = False) -> Optional[Sequence[str]]:
    """The names of a model's classes, None where they aren't known.

    They are those of the first data set in DATASETS.TRAIN, then TEST, that is registered with a
    name for each of the model's classes.

    Args:
        cfg: the model's config, None if it has none.
        load: also register the config's dataset cards, and load a data set whose names are known
            only then (``register_coco_instances``). What is not on this machine stays unknown.
    """
    if cfg is None:
        return None
    if load:
        try:
            register_cards(cfg.DATASETS.CARDS)
        except (FileNotFoundError, ValueError) as error:
            logger.warning(f"DATASETS.CARDS: {error}")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = _names_of(name, load) if name in DatasetCatalog else None
        if names and len(names) == class_count(cfg)[1]:
            return names
    return None


def _names_of(dataset: str, load: bool) -> Optional[Sequence[str]]:
    metadata = MetadataCatalog.get(dataset)
    if load and not metadata.get("thing_classes", None) and metadata.get("json_file", None):
        try:
            DatasetCatalog.get(dataset)
        except Exception as error:  # a data set's loader is anyone's code
            logger.warning(f"{dataset}: {type(error).__name__} {error}")
    return metadata.get("thing_classes", None)


def build_fusion(kd: CfgNode, student: nn.Module, teacher: Teacher) -> FeatureFusion:
    """Check taps, entry and route against both box heads and build the fusion.

    Args:
        kd: the node MODEL.CROSSKD.FUSION.

    Raises:
        ConfigError: naming the key.
    """
    heads = teacher.model.roi_heads
    ours = student.roi_heads.box_head_layers()
    theirs = BoxHeadLayers(heads.box_head, heads.box_pooler.output_size)
    taps = tuple(kd.IN_FEATURES) or ("fc1", "fc2")
    entry = kd.ENTRY or theirs.last
    _check_layers("IN_FEATURES", taps, ours, "student")
    _check_layers("ENTRY", (entry,), theirs, "teacher")
    if kd.ROUTE == "through":
        _check_layers("IN_FEATURES", taps, theirs, "teacher (route 'through')")
        deeper = [tap for tap in taps if theirs.depth(tap) > theirs.depth(entry)]
        if deeper:
            raise ConfigError(
                f"MODEL.CROSSKD.FUSION.IN_FEATURES: {deeper} lie deeper than ENTRY '{entry}', so "
                "route 'through' has no teacher layers to run; take taps from "
                f"{theirs.names[: theirs.depth(entry) + 1]}, or ROUTE direct"
            )
    return make_fusion(kd, taps, entry, kd.ROUTE, kd.ALIGN or "none", ours, theirs)


def make_fusion(
    kd: CfgNode,
    taps: Tuple[str, ...],
    entry: str,
    route: str,
    align: str,
    ours: NamedLayers,
    theirs: NamedLayers,
) -> FeatureFusion:
    """A fusion from layers of the student to one of the teacher.

    Args:
        kd: the node MODEL.CROSSKD.FUSION.
        taps, entry, route, align: as of :class:`FeatureFusion`.
        ours, theirs: the layers of student and teacher.

    Raises:
        ConfigError: if the shapes can't be bridged or the fusion refuses the taps.
    """
    try:
        return FeatureFusion(
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


def check_same_padding(
    key: str, student: nn.Module, teacher: Teacher, advice: str = "set it to 0.0"
) -> None:
    """Refuse backbones that pad images to different sizes, so that their maps differ in size.

    Args:
        key: what needs it, below MODEL.CROSSKD.
        advice: the end of the message.

    Raises:
        ConfigError: naming ``key``.
    """
    ours, theirs = (
        (b.size_divisibility, dict(b.padding_constraints))
        for b in (student.backbone, teacher.model.backbone)
    )
    if ours != theirs:
        raise ConfigError(
            f"MODEL.CROSSKD.{key} compares feature maps, but the student pads images to {ours} and "
            f"the teacher ({teacher.description}) to {theirs}; {advice}"
        )


def differing_anchors(ours: nn.Module, theirs: nn.Module, strides: str) -> str:
    """The config key by which two anchor generators differ, or "".

    Args:
        ours, theirs: the generators.
        strides: what to name where the strides differ.
    """
    if any(type(g) is not DefaultAnchorGenerator for g in (ours, theirs)):
        return "MODEL.ANCHOR_GENERATOR.NAME"
    if ours.strides != theirs.strides:
        return strides
    cells = [list(g.cell_anchors) for g in (ours, theirs)]
    if len(cells[0]) != len(cells[1]) or not all(
        x.shape == y.shape and x.equal(y) for x, y in zip(*cells)
    ):
        return "MODEL.ANCHOR_GENERATOR.SIZES or ASPECT_RATIOS"
    if ours.offset != theirs.offset:
        return "MODEL.ANCHOR_GENERATOR.OFFSET"
    return ""
