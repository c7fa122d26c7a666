"""``MODEL.CROSSKD`` and ``DATASETS.CARDS``: the keys, their defaults and the checks that need no
model."""

import functools
import math
import operator
from typing import Any, Sequence, Tuple

from detectron2.config import CfgNode as CN

from .distillation.compatibility import class_map
from .distillation.fusion import ALIGNMENTS, FEATURE_FUSION_REGISTRY, ROUTES

PRECISIONS = ("float32", "bfloat16", "float16")
BOX_LOSSES = ("l1", "giou", "iou")
MIMICS = ("cross_head", "student_head")
MASK_REDUCTIONS = ("mean", "published")
MASK_CHANNELS = ("all", "ground_truth")
META_ARCHITECTURES = ("CrossKDRCNN", "CrossKDRetinaNet", "CrossKDFCOS")


class ConfigError(ValueError):
    """A setting that can't work; the message names the config key, what was given and what is
    possible."""


def add_crosskd_ifc_config(cfg: CN) -> None:
    """Add the keys of this project to a detectron2 config."""
    # Dataset cards (YAML files) to register before training and evaluation.
    cfg.DATASETS.CARDS = ()
    _add_fcos_config(cfg)

    _C = cfg.MODEL.CROSSKD = CN()
    # False trains the student alone: stock detectron2, bit for bit.
    _C.ENABLED = True
    # Whose predictions learn to mimic the teacher's: "cross_head", the teacher's head on the
    # student's features, or "student_head", the student's own (the classic baseline).
    _C.MIMIC = "cross_head"
    # Prefixes of the student's tensors that start from the teacher's weights where names and shapes
    # agree, such as ("backbone.fpn", "proposal_generator").
    _C.INHERIT = ()

    _C.TEACHER = CN()
    # The teacher's own config: a file, or a model-zoo name such as
    # COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml.
    _C.TEACHER.CONFIG_FILE = ""
    # The teacher's trained weights, a file or URL. Empty: the zoo's checkpoint, for a model-zoo
    # name only.
    _C.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs that override the teacher's config.
    _C.TEACHER.OPTS = ()
    # Precision of the teacher's gradient-free forward: "float32", "bfloat16" or "float16".
    _C.TEACHER.PRECISION = "float32"
    # Which teacher class each student class is. (): the same, in the same order. ("teacher",): the
    # teacher has other classes, and cross-head predictions are in them. ("names",): equal names in
    # both DATASETS.TRAIN. Pairs such as ("tv", "television") or ("tv", ""), no such class, add to
    # or replace the names.
    _C.TEACHER.CLASS_MAP = ()
    # Evaluate the teacher on DATASETS.TEST before the first step.
    _C.TEACHER.EVAL_AT_START = False

    _C.FUSION = CN()
    # How the tapped features are combined: a key of FEATURE_FUSION_REGISTRY, such as "none",
    # "sum", "mean", "weighted", "attention", "concat".
    _C.FUSION.NAME = "mean"
    # The student's layers to tap: pool, conv1, ..., fc1, ... Empty: ("fc1", "fc2"), RetinaNet conv1
    # to conv3, FCOS conv1 and conv2.
    _C.FUSION.IN_FEATURES = ()
    # The teacher's layer whose output the combined feature replaces. Empty: the last of its box
    # head; of dense detectors the deepest tap.
    _C.FUSION.ENTRY = ""
    # "direct": each tap jumps to ENTRY; "through": it runs the teacher's layers from its own depth
    # to ENTRY.
    _C.FUSION.ROUTE = "direct"
    # "none", or "standardize" to the channel statistics of the teacher's feature at ENTRY. Empty:
    # "none", dense detectors "standardize".
    _C.FUSION.ALIGN = ""
    # Weight decay of all learned adapters and fusion weights, in place of SOLVER.WEIGHT_DECAY.
    _C.FUSION.WEIGHT_DECAY = 0.0

    _C.LOSS = CN()
    # Weight and temperature of the classification loss (KL divergence; quality focal, which has no
    # temperature, for dense detectors, whose weights CrossKD sets to 1.0 and, for FCOS, 0.4).
    _C.LOSS.CLS_WEIGHT = 0.5
    _C.LOSS.TEMPERATURE = 3.0
    # Box loss: "l1" on raw deltas, "giou" or (dense) "iou" on decoded boxes, and its weight. Empty:
    # "l1", RetinaNet "giou", FCOS "iou".
    _C.LOSS.BOX_TYPE = ""
    _C.LOSS.BOX_WEIGHT = 1.0
    # Weight of the mask loss (Mask R-CNN); "mean" divides its sum by the number of terms,
    # "published" by the number of box RoIs, which needs a weight far below 1; all channels or only
    # the ground truth's. See docs/options.md for the measured difference.
    _C.LOSS.MASK_WEIGHT = 10.0
    _C.LOSS.MASK_REDUCTION = "mean"
    _C.LOSS.MASK_CHANNELS = "all"
    # Weight of the feature loss (PKD) on the pyramid's levels; COMBINE compares each teacher level
    # with the sum of all the student's levels, resized to it, and not with the same level alone.
    _C.LOSS.FEATURE_WEIGHT = 0.0
    _C.LOSS.FEATURE_COMBINE = True
    # Weight of RPN mimicking; needs MODEL.PROPOSAL_GENERATOR.NAME CrossKDRPN.
    _C.LOSS.RPN_WEIGHT = 0.0

    _C.SCHEDULE = CN()
    # Distil from this iteration on ...
    _C.SCHEDULE.START_ITER = 0
    # ... with losses that rise linearly over this many iterations ...
    _C.SCHEDULE.WARMUP_ITERS = 0
    # ... up to, not including, this iteration; -1: to the end. The teacher isn't run where the
    # factor is 0.
    _C.SCHEDULE.STOP_ITER = -1

    _C.DIAGNOSTICS = CN()
    # Log every so many iterations how the gradients of distillation and detection agree; 0: never.
    # Such a step has two partial backward passes more; see docs/options.md for the measured cost.
    _C.DIAGNOSTICS.GRAD_PERIOD = 0


def _add_fcos_config(cfg: CN) -> None:
    """``MODEL.FCOS``: detectron2 configures its FCOS without yacs, with these defaults."""
    _C = cfg.MODEL.FCOS = CN()
    _C.NUM_CLASSES = 80
    # Levels of the pyramid, from MODEL.BACKBONE.NAME build_fcos_resnet_fpn_backbone.
    _C.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each tower of the head, and their norm.
    _C.NUM_CONVS = 4
    _C.NORM = "GN"
    # Foreground probability that the classification starts from.
    _C.PRIOR_PROB = 0.01
    # Positions are positive within this distance from a box's centre, in units of the stride.
    _C.CENTER_SAMPLING_RADIUS = 1.5
    _C.FOCAL_LOSS_ALPHA = 0.25
    _C.FOCAL_LOSS_GAMMA = 2.0
    # Threshold of sqrt(class probability * centerness), candidates per level, NMS overlap.
    _C.SCORE_THRESH_TEST = 0.2
    _C.TOPK_CANDIDATES_TEST = 1000
    _C.NMS_THRESH_TEST = 0.6


def class_count(cfg: CN) -> Tuple[str, int]:
    """The config key that holds the number of foreground classes of a config's detector, and it."""
    stock = cfg.MODEL.META_ARCHITECTURE.replace("CrossKD", "")
    node = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}.get(stock, "ROI_HEADS")
    return f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES


def check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that isn't one of ``choices``.

    Raises:
        ConfigError: naming ``key``, the value and the choices.
    """
    if value not in choices:
        raise ConfigError(
            f"MODEL.CROSSKD.{key} is {value!r}; possible values: {', '.join(map(repr, choices))}"
        )


def check_crosskd_config(cfg: CN) -> None:
    """Check all settings of ``MODEL.CROSSKD`` that can be judged without the models.

    Raises:
        ConfigError: for the first setting that can't work.
    """
    _check_types(cfg)
    kd = cfg.MODEL.CROSSKD
    check_choice("MIMIC", kd.MIMIC, MIMICS)
    check_choice("FUSION.NAME", kd.FUSION.NAME, FEATURE_FUSION_REGISTRY.names())
    check_choice("FUSION.ROUTE", kd.FUSION.ROUTE, ROUTES)
    check_choice("FUSION.ALIGN", kd.FUSION.ALIGN, ("", *ALIGNMENTS))
    check_choice("LOSS.BOX_TYPE", kd.LOSS.BOX_TYPE, ("", *BOX_LOSSES))
    check_choice("LOSS.MASK_REDUCTION", kd.LOSS.MASK_REDUCTION, MASK_REDUCTIONS)
    check_choice("LOSS.MASK_CHANNELS", kd.LOSS.MASK_CHANNELS, MASK_CHANNELS)
    check_choice("TEACHER.PRECISION", kd.TEACHER.PRECISION, PRECISIONS)
    try:
        class_map.parse(kd.TEACHER.CLASS_MAP)
    except ValueError as error:
        raise ConfigError(f"MODEL.CROSSKD.TEACHER.CLASS_MAP is {error}") from None
    _check_names("FUSION.IN_FEATURES", kd.FUSION.IN_FEATURES, "layer names, such as ('fc1', 'fc2')")
    _check_names("INHERIT", kd.INHERIT, "module names, such as ('backbone', 'proposal_generator')")
    for key in ("CLS_WEIGHT", "BOX_WEIGHT", "MASK_WEIGHT", "FEATURE_WEIGHT", "RPN_WEIGHT"):
        _check_number(f"LOSS.{key}", kd.LOSS[key])
    _check_number("FUSION.WEIGHT_DECAY", kd.FUSION.WEIGHT_DECAY)
    if not (math.isfinite(kd.LOSS.TEMPERATURE) and kd.LOSS.TEMPERATURE > 0):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TEMPERATURE is {kd.LOSS.TEMPERATURE}; it must be a number > 0"
        )
    for key in ("SCHEDULE.START_ITER", "SCHEDULE.WARMUP_ITERS", "DIAGNOSTICS.GRAD_PERIOD"):
        node, leaf = key.split(".")
        _check_number(key, kd[node][leaf])
    start, stop = kd.SCHEDULE.START_ITER, kd.SCHEDULE.STOP_ITER
    if stop != -1 and stop <= start:
        raise ConfigError(
            f"MODEL.CROSSKD.SCHEDULE.STOP_ITER is {stop}; it must be -1 (never) or greater than "
            f"START_ITER, {start}"
        )
    if kd.MIMIC == "student_head":
        check_unused(cfg, ("FUSION",), "MIMIC 'student_head' compares predictions, not features")
    if not cfg.MODEL.MASK_ON:
        keys = ("LOSS.MASK_WEIGHT", "LOSS.MASK_REDUCTION", "LOSS.MASK_CHANNELS")
        check_unused(cfg, keys, "the student has no mask head (MODEL.MASK_ON False)")


def check_unused(cfg: CN, keys: Sequence[str], reason: str) -> None:
    """Refuse settings that would have no effect.

    Args:
        keys: below MODEL.CROSSKD: leaves, or nodes with all leaves below.
        reason: why they have none.

    Raises:
        ConfigError: naming the first key that isn't at its default.
    """
    default = _defaults()
    for key in keys:
        theirs, ours = (
            functools.reduce(operator.getitem, key.split("."), c.MODEL.CROSSKD)
            for c in (default, cfg)
        )
        pairs = {key: (theirs, ours)}
        if isinstance(theirs, CN):
            pairs = {f"{key}.{leaf}": (theirs[leaf], ours[leaf]) for leaf in theirs}
        for name, (expected, found) in pairs.items():
            if found != expected and tuple(_listed(found)) != tuple(_listed(expected)):
                raise ConfigError(
                    f"MODEL.CROSSKD.{name} is {found!r}, but {reason}; set it to its default, "
                    f"{expected!r}"
                )


def _defaults() -> CN:
    default = CN({"DATASETS": CN(), "MODEL": CN()})
    add_crosskd_ifc_config(default)
    return default


def _check_types(cfg: CN) -> None:
    # yacs lets a null through for every key, also for a whole section.
    nodes = [("MODEL.CROSSKD", _defaults().MODEL.CROSSKD, cfg.MODEL.CROSSKD)]
    for name, theirs, ours in nodes:
        if isinstance(theirs, CN) and isinstance(ours, CN):
            nodes += [(f"{name}.{key}", theirs[key], ours.get(key)) for key in theirs]
        elif not isinstance(ours, type(theirs)):
            same = ((tuple, list), (float, int), (list, tuple))
            if isinstance(ours, bool) or (type(theirs), type(ours)) not in same:
                raise ConfigError(
                    f"{name} is {ours!r}; it must be of the type of its default, "
                    f"{'a section' if isinstance(theirs, CN) else repr(theirs)}"
                )


def _listed(value: Any) -> Sequence:
    return value if isinstance(value, (list, tuple)) else (value,)


def _check_number(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"MODEL.CROSSKD.{key} is {value}; it must be a number >= 0")


def _check_names(key: str, names: Sequence, what: str) -> None:
    names = tuple(names)
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"MODEL.CROSSKD.{key} is {names}; it must be a list of {what}")
    if len(set(names)) != len(names):
        raise ConfigError(f"MODEL.CROSSKD.{key} names something twice: {names}")


def distillation_requested(cfg: CN) -> bool:
    """Whether training this config needs a teacher.

    Raises:
        ConfigError: if architecture and teacher settings contradict each other, so that the run
            would silently be another one than its config says.
    """
    kd = cfg.MODEL.CROSSKD
    if not kd.ENABLED:
        return False
    architecture, has_teacher = cfg.MODEL.META_ARCHITECTURE, bool(kd.TEACHER.CONFIG_FILE)
    if architecture in META_ARCHITECTURES and not has_teacher:
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty, but {architecture} needs a teacher to "
            "train; set it (with TEACHER.WEIGHTS), or MODEL.CROSSKD.ENABLED False to train the "
            "student alone"
        )
    if architecture not in META_ARCHITECTURES and has_teacher:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {architecture!r}, which can't distil, but "
            f"MODEL.CROSSKD.TEACHER.CONFIG_FILE is {kd.TEACHER.CONFIG_FILE!r}; set the "
            f"architecture to one of {', '.join(META_ARCHITECTURES)}, or MODEL.CROSSKD.ENABLED "
            "False"
        )
    return has_teacher
