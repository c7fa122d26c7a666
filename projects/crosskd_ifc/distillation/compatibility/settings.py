"""Settings of ``MODEL.CROSSKD`` that can be judged without the models."""

import functools
import math
import operator
from typing import Any, Dict, Sequence

from detectron2.config import CfgNode as CN

from ...common.config_files import default_config
from ...config import ConfigError, error_prefix, fusion_name, teacher_configs
from ..fusion import ALIGNMENTS, FEATURE_FUSION_REGISTRY, ROUTES, are_separate
from ..loss_types import BOX_LOSS_REGISTRY, CLS_LOSS_REGISTRY, FEATURE_LOSS_REGISTRY
from . import class_map

PRECISIONS = ("float32", "bfloat16", "float16")
# Earlier defaults, as configs of earlier runs spell them out; unused they mean the same as today's.
_EARLIER_DEFAULTS = {"FUSION.NAME": "mean", "FUSION.ROUTE": "direct", "TEACHER.STAGE": 1}


def check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that isn't one of ``choices``.

    Raises:
        ConfigError: naming ``key``, the value and the choices.
    """
    if value not in choices:
        raise ConfigError(
            f"MODEL.CROSSKD.{key} is {value!r}; possible values: {', '.join(map(repr, choices))}"
        )


def _choices() -> Dict[str, Sequence[str]]:
    """Key below MODEL.CROSSKD -> its possible values; registries grow."""
    return {
        "MIMIC": ("cross_head", "student_head", "both"),
        "TEACHERS_LOSS": ("mean", "one"),
        "FUSION.NAME": ("", *FEATURE_FUSION_REGISTRY.names()),
        "FUSION.ROUTE": ("", *ROUTES),
        "FUSION.ALIGN": ("", *ALIGNMENTS),
        "LOSS.BOX_TYPE": ("", "l1", *BOX_LOSS_REGISTRY.names()),
        "LOSS.CLS_TYPE": CLS_LOSS_REGISTRY.names(),
        "LOSS.FEATURE_TYPE": FEATURE_LOSS_REGISTRY.names(),
        "LOSS.MASK_REDUCTION": ("mean", "published"),
        "LOSS.MASK_CHANNELS": ("all", "ground_truth"),
    }


def check_crosskd_config(cfg: CN) -> None:
    """Check all settings of ``MODEL.CROSSKD`` that can be judged without the models.

    Raises:
        ConfigError: for the first setting that can't work.
    """
    _check_types(cfg)
    kd = cfg.MODEL.CROSSKD
    for key, possible in _choices().items():
        check_choice(key, _at(kd, key), possible)
    if len(kd.TEACHERS) < 2:
        check_unused(kd, ("TEACHERS_LOSS",), "TEACHERS doesn't list several")
    for name, one in teacher_configs(cfg):
        with error_prefix(name):
            _check_teacher(one.MODEL.CROSSKD.TEACHER)
    if kd.TEACHERS and all("CONFIG_FILE" in one for one in kd.TEACHERS):
        keys = ("TEACHER.CONFIG_FILE", "TEACHER.WEIGHTS", "TEACHER.OPTS")
        check_unused(kd, keys, "each of TEACHERS has a CONFIG_FILE of its own")
    _check_names("FUSION.IN_FEATURES", kd.FUSION.IN_FEATURES, "layer names, such as ('fc1', 'fc2')")
    _check_names("INHERIT", kd.INHERIT, "module names, such as ('backbone', 'proposal_generator')")
    for key in kd.LOSS:
        if key.endswith("_WEIGHT"):
            _check_number(f"LOSS.{key}", kd.LOSS[key])
    _check_terms(kd, fusion_name(cfg))
    _check_number("FUSION.WEIGHT_DECAY", kd.FUSION.WEIGHT_DECAY)
    if not (math.isfinite(kd.LOSS.TEMPERATURE) and kd.LOSS.TEMPERATURE > 0):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TEMPERATURE is {kd.LOSS.TEMPERATURE}; it must be a number > 0"
        )
    for key in ("SCHEDULE.START_ITER", "SCHEDULE.WARMUP_ITERS", "DIAGNOSTICS.GRAD_PERIOD"):
        _check_number(key, _at(kd, key))
    start, stop = kd.SCHEDULE.START_ITER, kd.SCHEDULE.STOP_ITER
    if stop != -1 and stop <= start:
        raise ConfigError(
            f"MODEL.CROSSKD.SCHEDULE.STOP_ITER is {stop}; it must be -1 (never) or greater than "
            f"START_ITER, {start}"
        )
    if kd.MIMIC == "student_head":
        reason = "MIMIC 'student_head' compares predictions, not features"
        # What a feature loss learns decays, too.
        used = ("WEIGHT_DECAY",) if kd.LOSS.FEATURE_WEIGHT > 0 else ()
        fusion = [f"FUSION.{leaf}" for leaf in kd.FUSION if leaf not in used]
        check_unused(kd, (*fusion, "LOSS.FUSED_WEIGHT", "LOSS.TAP_WEIGHTS"), reason)
    if kd.LOSS.FEATURE_WEIGHT == 0:
        reason = "LOSS.FEATURE_WEIGHT is 0: features aren't compared"
        leaves = ("FEATURE_TYPE", "FEATURE_OPTS", "FEATURE_LEVELS")
        check_unused(kd, [f"LOSS.{leaf}" for leaf in leaves], reason)
    elif kd.LOSS.FEATURE_COMBINE and kd.LOSS.FEATURE_TYPE != "pkd":  # the published code's own
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.FEATURE_COMBINE is True, but {kd.LOSS.FEATURE_TYPE} compares each "
            "level of the pyramid with the teacher's same level; set it to False"
        )
    if not cfg.MODEL.MASK_ON:
        keys = ("LOSS.MASK_WEIGHT", "LOSS.MASK_REDUCTION", "LOSS.MASK_CHANNELS")
        check_unused(kd, keys, "the student has no mask head (MODEL.MASK_ON False)")
    if not cfg.MODEL.KEYPOINT_ON:
        reason = "the student has no keypoint head (MODEL.KEYPOINT_ON False)"
        check_unused(kd, ("LOSS.KEYPOINT_WEIGHT",), reason)


def _check_teacher(teacher: CN) -> None:
    check_choice("TEACHER.PRECISION", teacher.PRECISION, PRECISIONS)
    try:
        class_map.parse(teacher.CLASS_MAP)
    except ValueError as error:
        raise ConfigError(f"MODEL.CROSSKD.TEACHER.CLASS_MAP is {error}") from None


def _check_terms(kd: CN, combination: str) -> None:
    """The combined feature and the taps by themselves, as terms of the losses."""
    weights, fusion = kd.LOSS.TAP_WEIGHTS, kd.FUSION
    for i, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(
                f"MODEL.CROSSKD.LOSS.TAP_WEIGHTS is {tuple(weights)}; it must be a list of numbers"
            )
        _check_number(f"LOSS.TAP_WEIGHTS[{i}]", weight)
    separate = are_separate(combination, fusion.IN_FEATURES)
    if kd.LOSS.FUSED_WEIGHT == 0 and not any(weights) and not separate:
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.FUSED_WEIGHT is 0 and LOSS.TAP_WEIGHTS {tuple(weights)}: neither "
            "the combined feature nor a tap would be compared; set one of them above 0"
        )
    if separate and weights and not any(weights):
        raise ConfigError(
            f"MODEL.CROSSKD.LOSS.TAP_WEIGHTS is {tuple(weights)}: no tap would be compared; set "
            "one above 0, or ()"
        )
    _check_names("FUSION.DETACH", fusion.DETACH, "taps, such as ('pool',)")
    if fusion.DETACH and kd.LOSS.FUSED_WEIGHT == 0:
        raise ConfigError(
            f"MODEL.CROSSKD.FUSION.DETACH is {tuple(fusion.DETACH)}, but with LOSS.FUSED_WEIGHT "
            "0 the combined feature isn't compared; set it to ()"
        )


def _check_number(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"MODEL.CROSSKD.{key} is {value}; it must be a number >= 0")


def _check_names(key: str, names: Sequence, what: str) -> None:
    names = tuple(names)
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"MODEL.CROSSKD.{key} is {names}; it must be a list of {what}")
    if len(set(names)) != len(names):
        raise ConfigError(f"MODEL.CROSSKD.{key} names something twice: {names}")


def check_unused(crosskd: CN, keys: Sequence[str], reason: str) -> None:
    """Refuse settings that would have no effect.

    Args:
        crosskd: the node MODEL.CROSSKD.
        keys: below it, such as "LOSS.TEMPERATURE".
        reason: why they have none.

    Raises:
        ConfigError: naming the first key that isn't at its default.
    """
    default = default_config().MODEL.CROSSKD
    for key in keys:
        expected, found = _at(default, key), _at(crosskd, key)
        if found in (expected, _EARLIER_DEFAULTS.get(key, expected)):
            continue
        if tuple(_listed(found)) != tuple(_listed(expected)):
            raise ConfigError(
                f"MODEL.CROSSKD.{key} is {found!r}, but {reason}; set it to its default, "
                f"{expected!r}"
            )


def _at(crosskd: CN, key: str) -> Any:
    """What is at a key such as "LOSS.TEMPERATURE"."""
    return functools.reduce(operator.getitem, key.split("."), crosskd)


def _check_types(cfg: CN) -> None:
    # yacs lets a null through for every key, also for a whole section.
    nodes = [("MODEL.CROSSKD", default_config().MODEL.CROSSKD, cfg.MODEL.CROSSKD)]
    for name, theirs, ours in nodes:
        if isinstance(theirs, CN) and isinstance(ours, CN):
            nodes += [(f"{name}.{key}", theirs[key], ours.get(key)) for key in theirs]
        elif theirs is not None and not isinstance(ours, type(theirs)):
            same = ((tuple, list), (float, int), (list, tuple))
            if isinstance(ours, bool) or (type(theirs), type(ours)) not in same:
                raise ConfigError(
                    f"{name} is {ours!r}; it must be of the type of its default, "
                    f"{'a section' if isinstance(theirs, CN) else repr(theirs)}"
                )


def _listed(value: Any) -> Sequence:
    return value if isinstance(value, (list, tuple)) else (value,)
