"""What goes wrong while a run is set up, or in its first step, is one line: what it is, the config
key where it can be known, and where the traceback is."""

import contextlib
import linecache
import os
import re
import traceback
from typing import Callable, Iterator, List

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..common.config_files import LAZY_CONFIG, default_values, flat
from ..common.files import DISK_FULL
from ..config import ConfigError
from ..data.mapper import SampleError
from ..weights.reading import WeightsError
from .checkpointer import CheckpointError

# Last parts of keys that mean other things in code.
_PLAIN_WORDS = {"name", "train", "test", "type", "weights", "enabled", "format", "device", "seed"}
_PATH = re.compile(r"cfg\.((?:[A-Z][A-Z0-9_]*\.)*[A-Z][A-Z0-9_]*)")


class SetupError(ValueError):
    """Something that nobody has foreseen, in one line."""


# Their message says it all.
CLEAR_ERRORS = (ConfigError, CheckpointError, WeightsError, SampleError, SetupError)


@contextlib.contextmanager
def one_line_errors(cfg: CfgNode, is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Within this context, errors of any kind are one line, and their traceback is in the log.

    Args:
        cfg: of the run.
        is_over: whether the set-up is done, so that errors stay what they are.

    Raises:
        SetupError: in place of an error that isn't one of ``CLEAR_ERRORS``.
    """
    try:
        yield
    except CLEAR_ERRORS:
        raise
    except Exception as error:
        if is_over() or getattr(error, "errno", None) in DISK_FULL:
            raise
        raise SetupError(_one_line(error, cfg)) from error


def message_in_traceback(text: str, *kinds: type) -> str:
    """The message of the last error of one of these kinds in a traceback, or ""."""
    for kind in kinds:
        _, found, message = text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
        if found:
            return message.strip()
    return ""


def _one_line(error: Exception, cfg: CfgNode) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(f"{type(error).__name__}: {error}".split())
    line = f"the run can't start: {said[:500]} ({os.path.basename(place.filename)}:{place.lineno})"
    values = dict(flat(cfg))
    keys = [f"{key}, which is {values[key]!r}" for key in _suspects(error, cfg)]
    if keys:
        line += f". Look at {', and '.join(keys)}"
    log = os.path.join(cfg.OUTPUT_DIR, "log.txt")
    try:
        with PathManager.open(log, "a") as f:
            f.write("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    except OSError:
        return line
    return f"{line}. The traceback is in {log}"


def _suspects(error: Exception, cfg: CfgNode) -> List[str]:
    """Keys that this run sets and that the error names: by a value, or in the code that
    failed, as the path of a key or by its last part."""
    if LAZY_CONFIG in cfg:  # its code isn't in these keys
        return []
    before = default_values()
    ours = {k: v for k, v in flat(cfg) if k not in before or before[k] != v}
    said = str(error)
    named = [
        k
        for k, v in ours.items()
        if isinstance(v, str) and re.search(rf"(?<![\w/.]){re.escape(v)}(?![\w/.])", said) and v
    ]
    if named:
        return named
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        last = getattr(frame, "end_lineno", None) or frame.lineno
        code = "".join(linecache.getline(frame.filename, i) for i in range(frame.lineno, last + 1))
        paths = [k for k in dict.fromkeys(_PATH.findall(code)) if k in ours]
        words = set(re.findall(r"\w+", code.lower())) - _PLAIN_WORDS
        found = paths or [k for k in ours if k.rpartition(".")[2].lower() in words]
        if found:
            return found[:3]
    return []
