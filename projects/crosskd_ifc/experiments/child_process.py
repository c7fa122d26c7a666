"""One run's process and folder: who may write to the folder, and how the process ends."""

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import threading
import time
from typing import BinaryIO, Callable, Mapping, Optional, Sequence, Tuple

from ..common.files import move_aside, read_json_if_any

logger = logging.getLogger(__name__)


class RunFailed(RuntimeError):
    """A training run ended with an error; the message shows the end of its log."""


class RunDiverged(RunFailed):
    """A training run ended because a loss wasn't finite."""


class RunStopped(RunFailed):
    """A training run was told to stop; it goes on when it is started again."""


def claim_folder(
    folder: str, *, name: str, digest: str, stop: Optional[threading.Event] = None
) -> BinaryIO:
    """Claim a run's folder for this process and its child alone, waiting for another one, as far
    as the file system has locks.

    The child inherits the lock with its output, so that it outlives a killed parent: nobody trains
    in the folder until the child has ended, too. A folder that holds another run is moved aside.

    Args:
        folder: made if it doesn't exist.
        name: of the run, for people.
        digest: "digest" in ``started.json``, if the folder holds this very run.
        stop: set it from another thread to end the waiting.

    Returns:
        ``console.log``, opened and locked: the output of the child. Closing it gives up the folder.

    Raises:
        RunStopped: if ``stop`` was set.
    """
    path, told = os.path.join(folder, "console.log"), False
    while True:
        os.makedirs(folder, exist_ok=True)
        log = open(path, "ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            if not told:
                logger.warning(f"{name}: waiting for the process that trains in {folder}")
            told = True
            if stop is not None and stop.is_set():
                raise RunStopped(f"{name} was stopped") from None
            time.sleep(1)
            continue
        except OSError as error:  # a file system without locks, as some of clusters
            logger.warning(f"{path}: it can't be locked ({error}): train in this folder only once")
        # The one that we waited for may have moved the folder aside.
        if os.path.exists(path) and os.path.samestat(os.fstat(log.fileno()), os.stat(path)):
            started = read_json_if_any(os.path.join(folder, "started.json")) or {}
            is_new = os.listdir(folder) == ["console.log"] and not os.path.getsize(path)
            if is_new or started.get("digest") == digest:
                return log
            move_aside(folder)
        log.close()


def supervise(
    command: Sequence[str],
    log: BinaryIO,
    threads: int,
    stop: Optional[threading.Event],
    every_second: Callable[[], None],
    grace: Callable[[], float] = lambda: 60.0,
    environment: Optional[Mapping[str, str]] = None,
) -> Tuple[int, float]:
    """Run a command until it ends or ``stop`` is set.

    Args:
        command: program and arguments.
        log: for its output.
        threads: its OMP_NUM_THREADS; 0 leaves the environment as it is.
        stop: set it from another thread to end the process.
        every_second: called while the process runs.
        grace: called when the process is told to end: seconds until it is killed.
        environment: what its environment has beside this process's.

    Returns:
        Its exit status, and its peak memory in GB (0 where there is no /proc).
    """
    environment = {**os.environ, **(environment or {})}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    memory = 0.0
    # In a session of its own: a Ctrl-C in the terminal is for this process, which ends it well.
    quiet = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    process = subprocess.Popen(command, env=environment, **quiet)
    try:
        while process.poll() is None and not (stop is not None and stop.is_set()):
            every_second()
            memory = max(memory, _peak_memory_gb(process.pid))
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                pass
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=grace())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return process.returncode, memory


class StepCounter:
    """How far a training is, from what its ``metrics.json`` has gained since the last look."""

    def __init__(self, path: str, steps: int):
        """
        Args:
            path: of the file, which may not be there yet.
            steps: in all.
        """
        self.path, self.steps = path, steps
        self.done, self.seconds_per_step, self._offset = 0, 0.0, 0

    def look(self) -> Tuple[int, int, float]:
        """Steps done, steps in all, and seconds per step, 0 as long as that isn't known."""
        try:
            with open(self.path, "rb") as f:
                if f.seek(0, os.SEEK_END) < self._offset:  # another file: it began anew
                    self._offset = self.done = 0
                f.seek(self._offset)
                new = f.read()
        except FileNotFoundError:
            new, self._offset, self.done = b"", 0, 0
        complete = new[: new.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(complete)
        for text in complete.splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                self.done = min(max(self.done, line["iteration"] + 1), self.steps)
                self.seconds_per_step = line.get("time", self.seconds_per_step)
        return self.done, self.steps, self.seconds_per_step

    def grace(self) -> float:
        """Seconds that a training needs to save and exit: several processes look for a signal at
        every tenth step; one finishes its step, or a batch of an evaluation."""
        return 60 + 20 * self.seconds_per_step


def _peak_memory_gb(pid: int) -> float:
    """The most memory that a process has had resident so far."""
    try:
        with open(f"/proc/{pid}/status") as f:
            lines = [line for line in f if line.startswith("VmHWM")]
    except OSError:
        return 0.0
    return int(lines[0].split()[1]) / 1024**2 if lines else 0.0
