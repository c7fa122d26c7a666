"""A run's OUTPUT_DIR: one that can be written, and that no other training writes to."""

import contextlib
import datetime
import logging
import os
import socket
import tempfile
from typing import Any, Iterator

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..common.files import move_aside
from ..config import ConfigError
from .wandb_writer import WANDB_ID

logger = logging.getLogger(__name__)

_LOCK = ".training"


def check_output_folder(folder: str) -> None:
    """Make it if needed; on any machine.

    Raises:
        ConfigError: if there can't be one.
    """
    if not folder:
        raise ConfigError("OUTPUT_DIR is empty; name a folder for checkpoints and logs")
    try:
        PathManager.mkdirs(folder)
        if "://" not in folder:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"OUTPUT_DIR {folder!r}: it can't be written: {why}") from error


def set_metrics_aside(folder: str) -> None:
    """Rename the ``metrics.json`` of an earlier training that has left no checkpoint, to which
    detectron2 would add the new training's lines; and its id for Weights & Biases, likewise."""
    path = os.path.join(folder, "metrics.json")
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    logger.info(f"{path} was of an earlier training; it is now {move_aside(path)}")
    if os.path.isfile(os.path.join(folder, WANDB_ID)):
        move_aside(os.path.join(folder, WANDB_ID))


def end_last_line(folder: str) -> None:
    """End the last line of a ``metrics.json`` that a full disk or a kill has cut off; the next one
    would be added to it, and be lost with it."""
    path = os.path.join(folder, "metrics.json")
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    with open(path, "rb+") as f:
        f.seek(-1, os.SEEK_END)
        if f.read() != b"\n":
            f.write(b"\n")


@contextlib.contextmanager
def training_alone_in(
    folder: str, *, key: str = "OUTPUT_DIR", what: str = "training"
) -> Iterator[None]:
    """Within this context, other trainings are kept out of a folder; enter it in every process.

    The lock belongs to the main process and ends with it, however it ends. A file system without
    locks is warned of.

    Args:
        folder: an existing one.
        key, what: of it and of what writes there, for the error.

    Raises:
        ConfigError: in every process, if another training is there; says which.
    """
    lock, holder = None, ""
    if comm.is_main_process() and "://" not in folder:
        lock = open(os.path.join(folder, _LOCK), "a+")
        holder = _lock(lock)
    try:
        holder = comm.all_gather(holder)[0]
        if holder:
            raise ConfigError(
                f"{key} {os.path.abspath(folder)}: another {what} writes to it ({holder}). "
                f"Wait for its end, stop it, or give another {key}"
            )
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(file: Any) -> str:
    """Lock an open file for this process and say so in it; returns who has locked it before, or
    "" ."""
    try:
        import fcntl

        # Unlike flock's, this lock isn't inherited by a data loader's workers, which outlive a
        # process that is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file.read(500).strip() or "it doesn't say which"
    except (ImportError, OSError) as error:
        logger.warning(f"{file.name}: it can't be locked ({error}): don't start a second training")
        return ""
    since = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    file.flush()
    return ""
