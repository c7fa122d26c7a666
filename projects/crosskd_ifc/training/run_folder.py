"""The checkpoints in a run's folder, its OUTPUT_DIR."""

import os
import re
from typing import List

from detectron2.utils.file_io import PathManager

from ..config import ConfigError

_NAMES = re.compile(r"model_(\d+|final)\.pth")  # as detectron2's hooks give them


def has_checkpoint(folder: str) -> bool:
    """Whether there is something to resume from in a run's folder."""
    tag = os.path.join(folder, "last_checkpoint")
    return PathManager.exists(tag) or bool(find_checkpoints(folder))


def check_tag(folder: str) -> None:
    """Refuse a local folder with a ``last_checkpoint``, but no checkpoint.

    Raises:
        ConfigError: saying what to do.
    """
    tag = os.path.join(folder, "last_checkpoint")
    if (
        os.path.isfile(tag)
        and not find_checkpoints(folder)
        and not os.path.isfile(tagged_checkpoint(folder))
    ):
        raise ConfigError(
            f"OUTPUT_DIR {os.path.abspath(folder)} has a file last_checkpoint, but no checkpoint: "
            "delete it to start anew, or put the checkpoint back"
        )


def tagged_checkpoint(folder: str) -> str:
    """The file that ``last_checkpoint`` names, in this folder; "" if it names none."""
    tag = os.path.join(folder, "last_checkpoint")
    if not os.path.isfile(tag):
        return ""
    with open(tag, "rb") as f:
        # The folder of a path may be the one that this was copied from.
        name = os.path.basename(f.read(1000).decode(errors="replace").strip())
    return os.path.join(folder, name) if name else ""


def find_checkpoints(folder: str) -> List[str]:
    """The checkpoints in a local folder: the final one, then those of the most iterations first."""
    if "://" in folder or not os.path.isdir(folder):
        return []
    files = [os.path.join(folder, x) for x in filter(_NAMES.fullmatch, os.listdir(folder))]
    return sorted(files, key=number_of, reverse=True)


def last_checkpoint(folder: str) -> str:
    """The one that ``last_checkpoint`` names, or the one of the most iterations; "" if there is
    none. ``model_final.pth`` may be of an earlier, shorter training."""
    named = tagged_checkpoint(folder)
    return named if os.path.isfile(named) else next(iter(find_checkpoints(folder)), "")


def number_of(file: str) -> float:
    """The iteration that a checkpoint's name tells; more than all others for the final one, which
    doesn't tell."""
    number = _NAMES.fullmatch(os.path.basename(file)).group(1)
    return float("inf") if number == "final" else int(number)
