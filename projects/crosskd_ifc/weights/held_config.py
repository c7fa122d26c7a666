"""What a checkpoint of this project holds of its run, beside the config that is named for its
weights."""

import logging
import re
from typing import Any, List, Mapping, Optional, Sequence

import yaml
from detectron2.config import CfgNode

from ..common.config_files import LAZY_CONFIG, flat
from ..common.safe_yaml import load_yaml
from ..config import ConfigError
from ..data.class_names import class_names

logger = logging.getLogger(__name__)

# Keys that weights fit with any value of, and that change what a model finds.
_OF_PREDICTIONS = re.compile(
    r"INPUT\.FORMAT|MODEL\.(PIXEL_(MEAN|STD)|ANCHOR_GENERATOR\..*|(BACKBONE|TIMM)\.NAME)"
    r"|.*(BBOX_REG_WEIGHTS|\.IN_FEATURES|POOLER_(TYPE|RESOLUTION|SAMPLING_RATIO))"
    r"|.*(STRIDE_IN_1X1|RES5_DILATION|FUSE_TYPE|USE_SIGMOID_CE|NMS_THRESH)"
)
_BACKBONE = "MODEL.BACKBONE.NAME"
# What an FCOS of an earlier version calls the same backbone.
_RENAMED = {"build_fcos_resnet_fpn_backbone": "build_crosskd_fcos_resnet_fpn_backbone"}
_OF_EVALUATION = re.compile(r".*(_TEST|DETECTIONS_PER_IMAGE)")


def differing_keys(checkpoint: Any, cfg: CfgNode, *, evaluation: bool) -> List[str]:
    """Keys because of which a config makes other predictions than the one in a checkpoint.

    Args:
        checkpoint: its content; without a config in it there are no such keys.
        cfg: the named config.
        evaluation: whether sizes and thresholds of an evaluation count, too.
    """
    try:
        then = dict(flat(load_yaml(checkpoint["config"]["yaml"])))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError):
        return []
    now = dict(flat(load_yaml(cfg.dump())))
    for held in (then, now):
        if held.get(_BACKBONE) in _RENAMED:
            held[_BACKBONE] = _RENAMED[held[_BACKBONE]]
    if (LAZY_CONFIG in then) != (LAZY_CONFIG in now):  # most of a LazyConfig isn't in these keys
        return []
    return [
        key
        for key in now
        if key in then and now[key] != then[key] and not key.startswith("MODEL.CROSSKD.")
        if _OF_PREDICTIONS.fullmatch(key) or (evaluation and _OF_EVALUATION.fullmatch(key))
    ]


def check_class_order(checkpoint: Any, cfg: CfgNode, source: str) -> None:
    """Refuse a config whose data sets have a class of the checkpoint at another index.

    Args:
        checkpoint: its content; what it doesn't say isn't compared.
        cfg: whose data sets are registered.
        source: of the weights, for the error.

    Raises:
        ConfigError: naming the class.
    """
    held = _held_classes(checkpoint)
    moved = _moved(held, class_names(cfg) or ())
    if moved:
        raise ConfigError(
            f"{source}: {moved}. Take the data set as it was, with the classes {', '.join(held)}, "
            "or train anew"
        )


def classes_of(checkpoint: Any, cfg: CfgNode, source: str) -> Optional[Sequence[str]]:
    """The names of a model's classes: those of its config's data sets, unless they have changed
    places, or else those in the checkpoint; None where neither knows them.

    Args:
        checkpoint: its content.
        cfg: the config that is used with it; its dataset cards are registered.
        source: of the weights, for the log.
    """
    held, names = _held_classes(checkpoint), class_names(cfg, cards=True) or ()
    moved = _moved(held, names)
    if moved:
        logger.warning(f"{source}: {moved}; the names of the training are taken")
        return held
    return list(names) or held or None


def _held_classes(checkpoint: Any) -> List[str]:
    config = checkpoint.get("config") if isinstance(checkpoint, Mapping) else None
    held = config.get("classes") if isinstance(config, Mapping) else None
    return [str(name) for name in held] if isinstance(held, list) else []


def _moved(held: Sequence[str], names: Sequence[str]) -> str:
    """The first class that has another index now, in words, or ""."""
    for i, name in enumerate(held):
        if name in names and list(names[i : i + 1]) != [name]:
            return (
                f"class {name!r} had the index {i} in the training of these weights and has "
                f"{list(names).index(name)} in DATASETS.TRAIN and DATASETS.TEST now"
            )
    return ""
