"""A run's config is kept in its checkpoints: what a resumed run does otherwise is told."""

import os
import re
from typing import Any, Dict, List, Mapping, Tuple

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from ..common.config_files import LAZY_CONFIG, default_config, flat, map_files
from ..common.safe_yaml import load_yaml
from ..config import ConfigError
from ..data.class_names import class_names

# Where things lie, how they are evaluated, how often something is written, how data are read: what
# may change without changing the experiment. The teacher's weights have a digest of their own.
_NO_CHANGE = re.compile(
    r"OUTPUT_DIR|VERSION|WANDB\..*|VIS_PERIOD"
    r"|TEST\.(?!PRECISE_BN).*|.*_TEST|DATASETS\.(TEST|CARDS)"
    r"|DATALOADER\.NUM_WORKERS|SOLVER\.CHECKPOINT_PERIOD|MODEL\.WEIGHTS"
    r"|MODEL\.CROSSKD\.(TEACHER\.(WEIGHTS|EVAL_AT_START)|DIAGNOSTICS\..*)"
)
_TEACHER = "MODEL.CROSSKD.TEACHER.CONFIG_FILE"  # another path is none, but no path is
_PROCESSES = "number of processes"
# Files, or teachers with files: their folders are no change.
_FILES = ("MODEL.CROSSKD.TEACHERS", "MODEL.CROSSKD.IMPORTS", LAZY_CONFIG)


def describe_run(cfg: CfgNode) -> Dict[str, Any]:
    """What a checkpoint keeps of the run that writes it: plain values."""
    names = class_names(cfg)
    classes = None if names is None else list(names)
    return {"yaml": cfg.dump(), "processes": comm.get_world_size(), "classes": classes}


def changed_settings(kept: Mapping[str, Any], cfg: CfgNode) -> List[Tuple[str, Any, Any]]:
    """(key, then, now) of all that changes the experiment.

    Args:
        kept: what :func:`describe_run` gave.
        cfg: of the run that goes on.

    Raises:
        ConfigError: if ``kept`` can't be read.
    """
    before = _settings({"yaml": default_config().dump(), "processes": None})
    # A key that an earlier version didn't have was at its default.
    then, now = ({**before, **_settings(x)} for x in (kept, describe_run(cfg)))
    keys = [k for k in sorted({*then, *now}) if not _NO_CHANGE.fullmatch(k)]
    return [(k, then.get(k), now.get(k)) for k in keys if then.get(k) != now.get(k)]


def is_distilled(kept: Mapping[str, Any]) -> bool:
    """Whether the run that :func:`describe_run` described has a teacher's losses.

    Raises:
        ConfigError: if it can't be read.
    """
    settings = _settings(kept)
    teachers = settings.get("MODEL.CROSSKD.TEACHERS") or settings[_TEACHER] == "a teacher"
    return bool(teachers and settings.get("MODEL.CROSSKD.ENABLED", True))


def as_table(changed: List[Tuple[str, Any, Any]]) -> str:
    """What :func:`changed_settings` gave, for people."""
    rows = [(key, *map(_shown, values)) for key, *values in changed]
    return tabulate(rows, headers=("setting", "then", "now"), disable_numparse=True)


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:56]} ..."


def _settings(kept: Mapping[str, Any]) -> Dict[str, Any]:
    try:
        settings = dict(flat(load_yaml(kept["yaml"])))
        settings[_PROCESSES] = kept["processes"]
    except (AttributeError, KeyError, RecursionError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"what the checkpoint says of its run can't be read: {error}") from error
    settings[_TEACHER] = "a teacher" if settings.get(_TEACHER) else "no teacher"
    return {k: map_files(os.path.basename, v) if k in _FILES else v for k, v in settings.items()}
