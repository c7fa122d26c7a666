"""``MODEL.CROSSKD`` and ``DATASETS.CARDS``: the keys, their defaults and the checks that need no
model."""

import math
from typing import Any, Sequence, Tuple

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN

from .data import resolve_path
from .fusion import ALIGNMENTS, FEATURE_FUSION_REGISTRY, ROUTES

PRECISIONS = ("float32", "bfloat16", "float16")
BOX_LOSSES = ("l1", "giou")
META_ARCHITECTURES = ("CrossKDRCNN",)
# TEACHER.CLASS_MAP value that accepts a teacher of other classes: all predictions compared are the
# teacher's.
TEACHER_CLASSES = ("teacher",)


# What yacs, fvcore and YAML raise for input that is no config of known keys and fitting types.
_MERGE_ERRORS = (
    AssertionError,
    AttributeError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)


class ConfigError(ValueError):
    """A setting that can't work; the message names the config key, what was given and what is
    possible."""


def add_crosskd_ifc_config(cfg: CN) -> None:
    """Add the keys of this project to a detectron2 config."""
    # Dataset cards (YAML files) to register before training and evaluation.
    cfg.DATASETS.CARDS = ()

    _C = cfg.MODEL.CROSSKD = CN()
    # False trains the student alone: stock detectron2, bit for bit.
    _C.ENABLED = True

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
    # ("teacher",) accepts a teacher with another number of classes than the student.
    _C.TEACHER.CLASS_MAP = ()
    # Evaluate the teacher on DATASETS.TEST before the first step.
    _C.TEACHER.EVAL_AT_START = False

    _C.FUSION = CN()
    # How the tapped features are combined: a key of FEATURE_FUSION_REGISTRY, such as "none",
    # "sum", "mean", "weighted", "attention", "concat".
    _C.FUSION.NAME = "sum"
    # The student's layers to tap: pool, conv1, ..., fc1, ... Empty: ("fc1", "fc2").
    _C.FUSION.IN_FEATURES = ()
    # The teacher's layer whose output the combined feature replaces. Empty: the last of its box
    # head.
    _C.FUSION.ENTRY = ""
    # "direct": each tap jumps to ENTRY; "through": it runs the teacher's layers from its own depth
    # to ENTRY.
    _C.FUSION.ROUTE = "direct"
    # "none", or "standardize" to the channel statistics of the teacher's feature at ENTRY. Empty:
    # "none".
    _C.FUSION.ALIGN = ""

    _C.LOSS = CN()
    # Weight and temperature of the classification loss (KL divergence).
    _C.LOSS.CLS_WEIGHT = 0.5
    _C.LOSS.TEMPERATURE = 3.0
    # Box loss: "l1" on raw deltas or "giou" on decoded boxes, and its weight. Empty: "l1".
    _C.LOSS.BOX_TYPE = ""
    _C.LOSS.BOX_WEIGHT = 1.0

    _C.SCHEDULE = CN()
    # Distil from this iteration on ...
    _C.SCHEDULE.START_ITER = 0
    # ... with losses that rise linearly over this many iterations ...
    _C.SCHEDULE.WARMUP_ITERS = 0
    # ... up to, not including, this iteration; -1: to the end. The teacher isn't run where the
    # factor is 0.
    _C.SCHEDULE.STOP_ITER = -1


def find_config(name: str, *, key: str) -> Tuple[str, str]:
    """Find a config that a user named: current folder, then ``configs/``, then detectron2's zoo.

    Args:
        name: a path, or a model-zoo name such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml.
        key: the config key or argument that named it, for the error.

    Returns:
        The file's path, and the model-zoo name if it came from there, else "".

    Raises:
        ConfigError: listing what was tried.
    """
    try:
        zoo_path = model_zoo.get_config_file(name)
    except RuntimeError:
        zoo_path = ""
    try:
        tried = () if zoo_path else (f"model zoo: {name}",)
        return resolve_path(name, what="config", key=key, extra_tried=tried), ""
    except FileNotFoundError as error:
        if not zoo_path:
            raise ConfigError(str(error)) from None
    return zoo_path, name


def merge_from_file(cfg: CN, path: str, *, key: str) -> None:
    """``cfg.merge_from_file`` through safe YAML, with errors that say where they come from.

    Args:
        cfg: the config to merge into.
        path: YAML file.
        key: the config key or argument that named it, for the error.

    Raises:
        ConfigError: if the file is no config of known keys and fitting types.
    """
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except _MERGE_ERRORS as error:
        raise ConfigError(f"{key} {path}: {_text(error)}") from error


def merge_from_list(cfg: CN, opts: Sequence, *, key: str) -> None:
    """``cfg.merge_from_list`` with errors that say where they come from.

    Args:
        cfg: the config to merge into.
        opts: KEY, VALUE, ...
        key: the config key or argument that held them, for the error.

    Raises:
        ConfigError: for an unknown key, a value of another type, or an odd number of items.
    """
    try:
        cfg.merge_from_list(list(opts))
    except _MERGE_ERRORS as error:
        raise ConfigError(f"{key}: {_text(error)}") from error


def _text(error: Exception) -> str:
    # A KeyError shows the repr of its argument.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


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
    kd = cfg.MODEL.CROSSKD
    check_choice("FUSION.NAME", kd.FUSION.NAME, FEATURE_FUSION_REGISTRY.names())
    check_choice("FUSION.ROUTE", kd.FUSION.ROUTE, ROUTES)
    check_choice("FUSION.ALIGN", kd.FUSION.ALIGN, ("", *ALIGNMENTS))
    check_choice("LOSS.BOX_TYPE", kd.LOSS.BOX_TYPE, ("", *BOX_LOSSES))
    check_choice("TEACHER.PRECISION", kd.TEACHER.PRECISION, PRECISIONS)
    if tuple(kd.TEACHER.CLASS_MAP) not in ((), TEACHER_CLASSES):
        raise ConfigError(
            f"MODEL.CROSSKD.TEACHER.CLASS_MAP is {tuple(kd.TEACHER.CLASS_MAP)}; possible values: "
            f"() (equal class counts) or {TEACHER_CLASSES} (the teacher may have other classes)"
        )
    taps = tuple(kd.FUSION.IN_FEATURES)
    if not all(isinstance(tap, str) for tap in taps):
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.IN_FEATURES is {taps}; it must be a list of layer names, such "
            "as ('fc1', 'fc2')"
        )
    if len(set(taps)) != len(taps):
        raise ConfigError(f"MODEL.CROSSKD.FUSION.IN_FEATURES names a layer twice: {taps}")
    for key in ("CLS_WEIGHT", "BOX_WEIGHT"):
        if not (math.isfinite(kd.LOSS[key]) and kd.LOSS[key] >= 0):
            raise ConfigError(
                f"MODEL.CROSSKD.LOSS.{key} is {kd.LOSS[key]}; it must be a number >= 0"
            )
    if not (math.isfinite(kd.LOSS.TEMPERATURE) and kd.LOSS.TEMPERATURE > 0):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TEMPERATURE is {kd.LOSS.TEMPERATURE}; it must be a number > 0"
        )
    start, stop = kd.SCHEDULE.START_ITER, kd.SCHEDULE.STOP_ITER
    for key in ("START_ITER", "WARMUP_ITERS"):
        if kd.SCHEDULE[key] < 0:
            raise ConfigError(
                f"MODEL.CROSSKD.SCHEDULE.{key} is {kd.SCHEDULE[key]}; it must be >= 0"
            )
    if stop != -1 and stop <= start:
        raise ConfigError(
            f"MODEL.CROSSKD.SCHEDULE.STOP_ITER is {stop}; it must be -1 (never) or greater than "
            f"START_ITER, {start}"
        )


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
