"""Files that are there complete or not at all; digests of files; what is moved aside."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import time
import uuid
from typing import Any, Iterator, Optional, Sequence, Tuple

from detectron2.utils.file_io import PathManager
from iopath.common import file_io

from ..config import ConfigError

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # or its user's quota is
# After so long a file that is still unfinished is of a writer that was killed.
_ABANDONED = 3600  # seconds


@contextlib.contextmanager
def replacing(path: str) -> Iterator[Any]:
    """A binary file that takes the place of ``path`` when the context ends well.

    It is on disk by then. Otherwise ``path`` is as it was. Several writers don't disturb each
    other: one of them is the last.
    """
    folder, name = os.path.split(path)
    key = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]  # the name may be as long as names can
    beginning = f".unfinished-{key}-"
    _remove_abandoned(folder, beginning)
    partial = os.path.join(folder, beginning + uuid.uuid4().hex)
    try:
        with open(partial, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def _remove_abandoned(folder: str, beginning: str) -> None:
    for name in os.listdir(folder or "."):
        partial = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # another writer removes it, too
            if name.startswith(beginning) and os.path.getmtime(partial) < time.time() - _ABANDONED:
                os.remove(partial)


@contextlib.contextmanager
def locked(path: str, otherwise: str) -> Iterator[None]:
    """The lock ``path.lock``, waiting for it.

    Args:
        otherwise: what people have to see to where the file system has no locks, as some of
            clusters; a warning says it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_io.file_lock(path))
        except file_io.portalocker.AlreadyLocked:
            raise
        except (OSError, file_io.portalocker.LockException) as error:
            logger.warning(f"{path}: it can't be locked ({error}): {otherwise}")
        yield


def move_aside(path: str) -> str:
    """Rename a folder or file, if it exists, to a name that is free: ``path.old1``, ...; returns
    it."""
    if not os.path.exists(path):
        return ""
    n = 1
    while os.path.exists(f"{path}.old{n}"):
        n += 1
    os.rename(path, f"{path}.old{n}")
    return f"{path}.old{n}"


def read_json_if_any(path: str) -> Optional[dict]:
    """The content of a JSON file; None if there is none, or none that is complete."""
    try:
        with open(path) as f:
            return json.load(f)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def file_sha256(path: str) -> str:
    """Of a file's bytes; "" if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return _sha256(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=None)
def _sha256(path: str, *changed: int) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            found.update(block)
    return found.hexdigest()


def write_json(path: str, content: dict) -> None:
    """Write a JSON file; it is there complete or not at all.

    NaN and infinity, which JSON doesn't have, become null.
    """
    with replacing(path) as f:
        f.write(json.dumps(_finite(content), indent=1, allow_nan=False).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_identity(path: str) -> Optional[Tuple[int, int]]:
    """Equal for two paths of one file; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def refuse_overwriting(
    out: str, *, sources: Sequence[str], force: bool, option: str = "OUT"
) -> None:
    """Refuse an ``out`` that exists, without ``force``, or that is one of the ``sources``.

    Args:
        option: what a user calls it.

    Raises:
        FileExistsError: naming the file.
    """
    if not os.path.lexists(out):
        return
    same = file_identity(out)
    if same is not None and any(file_identity(source) == same for source in sources):
        raise FileExistsError(f"{out}: this would overwrite the input; give another {option}")
    if not force:
        raise FileExistsError(f"{out} exists; give another {option}, or --force to replace it")


def claim_output(out: str, *, sources: Sequence[str] = (), force: bool, option: str) -> None:
    """Refuse an ``out`` that can't be written (:func:`refuse_overwriting`), and make its folder.

    Raises:
        ConfigError: naming the option.
    """
    try:
        refuse_overwriting(out, sources=sources, force=force, option=option)
        folder = os.path.dirname(out) or "."
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(f"{folder} is a file; expected a folder")
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: {error}") from error


@contextlib.contextmanager
def staging_folder(parent: str) -> Iterator[str]:
    """A temporary folder in ``parent``, from which complete files are moved to their place."""
    PathManager.mkdirs(parent)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as folder:
        yield folder
