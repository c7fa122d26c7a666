"""How a run ends when it is told to stop (SIGTERM), as cluster schedulers do: it finishes the step
or the batch of an evaluation, saves and ends, all processes at the same place."""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
from typing import Any, Callable, Iterator, Optional

from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader

from .checkpointer import SafeCheckpointer
from .resume import ResumeState

logger = logging.getLogger(__name__)

# Several processes agree only so often: it makes them wait for each other.
_AGREE_PERIOD = 10
# Whether this process has got a SIGTERM; None: SIGTERM does what it always does.
_asked: Optional[bool] = None


class Terminated(SystemExit):
    """A run was told to stop, and a checkpoint is there.

    Attributes:
        status: the exit status, as shells report a death by SIGTERM.
    """

    status = 128 + signal.SIGTERM

    def __init__(self):
        super().__init__(self.status)


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Within this context, a SIGTERM waits for :func:`stop_if_asked`. Enter it in every process."""
    global _asked
    if threading.current_thread() is not threading.main_thread():  # Python allows no handler
        yield
        return

    def note(*_: Any) -> None:
        global _asked
        _asked = True

    previous, _asked = signal.signal(signal.SIGTERM, note), False
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _asked = None


def stop_if_asked(done: int, *, last: bool = False) -> None:
    """End the run in every process if any has got a SIGTERM; call it in all of them, after as many
    steps or batches.

    Args:
        done: how many there were.
        last: whether these are all.

    Raises:
        Terminated: in every process.
    """
    if comm.get_world_size() > 1 and done % _AGREE_PERIOD and not last:
        return
    if _asked is not None and any(comm.all_gather(_asked)):
        raise Terminated


class StopAfterStep(HookBase):
    """Ends a run after a step if it was asked to; put it directly before the evaluation."""

    def __init__(self, state: ResumeState):
        self._state = state

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        try:
            stop_if_asked(done, last=done >= self.trainer.max_iter)
        except Terminated:
            self._state.gather()
            raise


class StoppableLoader:
    """A loader of test data whose evaluation can be told to stop.

    Attributes:
        loader: torch's; each process has its own share of the data.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if _asked is None:
            yield from self.loader
            return
        batches = iter(self.loader)
        for number in range(max(comm.all_gather(len(self.loader)))):
            if number < len(self.loader):
                yield next(batches)
            stop_if_asked(number + 1)


def keep_workers_on_sigterm(loader: Any) -> Any:
    """Let a loader's worker processes end on their parent's SIGTERM alone: `timeout` and SLURM send
    it to them, too, and their death would be an error of the training, before its step is done.

    Args:
        loader: torch's, or detectron2's around it; before its iterator is made.

    Returns:
        The same loader.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return loader
    inner = loader
    while not isinstance(inner, DataLoader):
        inner = inner._dataset if hasattr(inner, "_dataset") else inner.dataset
    inner.worker_init_fn = functools.partial(_obey_parent_alone, inner.worker_init_fn)
    return loader


def _obey_parent_alone(then: Optional[Callable[[int], None]], worker: int) -> None:
    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    parent = multiprocessing.parent_process()
    # Blocked, since a handler in Python isn't told who has sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, name="obey_parent_alone", daemon=True).start()
    if then is not None:
        then(worker)


@contextlib.contextmanager
def passing_on_sigterm() -> Iterator[None]:
    """Within this context, a SIGTERM goes to the processes that this one has started, and this one
    ends when they have ended; at once if there are none yet.

    Raises:
        Terminated: if a process has ended so, or of a SIGTERM before its training began.
    """

    def pass_on(*_: Any) -> None:
        children = multiprocessing.active_children()
        for process in children:
            process.terminate()
        if not children:
            raise Terminated

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code in (Terminated.status, -signal.SIGTERM):
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def save_iteration(trainer: DefaultTrainer, checkpointer: SafeCheckpointer, iteration: int) -> None:
    """Write the checkpoint that detectron2 would write after this iteration, if this process
    hasn't, and don't train any more.

    Args:
        trainer: whose last complete iteration this is; a next one may have begun.
    """
    trainer.iter = trainer._trainer.iter = iteration
    # Files tell nothing: those of this number, and model_final.pth, may be of an earlier run.
    if checkpointer.saved_iteration != iteration:
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
