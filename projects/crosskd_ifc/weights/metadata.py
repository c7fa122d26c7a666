"""What is to know of exported weights beyond their config: ``metadata.json`` beside them."""

import json
import os
from typing import Any, Dict, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..config import ConfigError, head_section

METADATA_NAME = "metadata.json"
_KEYS = {"classes", "score_threshold", "nms_threshold"}


def describe_detector(cfg: CfgNode, names: Optional[Sequence[str]]) -> Dict[str, Any]:
    """ "classes", their names in the model's order (null where they aren't known),
    "score_threshold" and "nms_threshold", which its detections have passed."""
    head = cfg.MODEL[head_section(cfg)]
    return {
        "classes": None if names is None else list(names),
        "score_threshold": head.SCORE_THRESH_TEST,
        "nms_threshold": head.NMS_THRESH_TEST,
    }


def yacs_settings(cfg: CfgNode) -> str:
    """What a detector and its images are, as YAML, less what only its training needed."""
    kept = CfgNode({key: cfg[key].clone() for key in ("MODEL", "INPUT", "TEST")})
    del kept.MODEL["CROSSKD"]
    return kept.dump()


def read_metadata(folder: str) -> Dict[str, Any]:
    """What :func:`describe_detector` gave, from the file in ``folder``, and of a detector whose
    config is code also "config", see :func:`yacs_settings`; {} if there is none.

    Raises:
        ConfigError: if the file holds something else.
    """
    path = os.path.join(folder, METADATA_NAME)
    if not PathManager.isfile(path):
        return {}
    try:
        with PathManager.open(path) as f:
            found = json.load(f)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    names = found.get("classes") if isinstance(found, dict) else ()
    is_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    is_whole = isinstance(found, dict) and _KEYS <= set(found) and (names is None or is_names)
    if not is_whole or not isinstance(found.get("config", ""), str):
        raise ConfigError(f"{path}: expected an object with {', '.join(sorted(_KEYS))}")
    return found
