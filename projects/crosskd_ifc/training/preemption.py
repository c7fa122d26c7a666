"""How a run ends when it is asked to stop (SIGTERM)."""

import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import Any, Callable, Optional

from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .checkpointer import SafeCheckpointer
from .resume import ResumeState

logger = logging.getLogger(__name__)

# Processes agree on stopping only this often: it makes them wait for each other.
_AGREE_PERIOD = 10


class Terminated(SystemExit):
    """A run was told to stop, and a checkpoint is there.

    Attributes:
        status: the exit status, as shells report a death by SIGTERM.
    """

    status = 128 + signal.SIGTERM

    def __init__(self):
        super().__init__(self.status)


class Termination(HookBase):
    """On SIGTERM, as cluster schedulers send it before they stop a job, finishes the step, writes a
    checkpoint and ends the run; an evaluation is broken off.

    Several processes agree on the step, since one that stops alone would leave the others waiting
    for it. Only in an evaluation, when all states are gathered, the main process saves and ends at
    once; the others end with it.

    Put it directly before the evaluation, and :attr:`evaluated` directly behind, in every process.

    Attributes:
        evaluated: a hook that tells that an evaluation is over.
        asked: whether this process has got a SIGTERM.
        stopped: whether the run has ended so, and saved.
    """

    def __init__(self, checkpointer: SafeCheckpointer, state: ResumeState, eval_period: int):
        """
        Args:
            eval_period: iterations between evaluations; 0 for none.
        """
        self._checkpointer, self._state, self._eval_period = checkpointer, state, eval_period
        self.evaluated = _Evaluated(self)
        self.asked = self.stopped = False
        self._at_once = self._evaluating = False
        self._done = -1  # last complete iteration
        self._previous: Any = None

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            self._previous = signal.signal(signal.SIGTERM, self._handle)

    def after_train(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def before_step(self) -> None:
        self._at_once = False
        if self.stopped:  # code in C++ that was being run has lost the exception
            raise Terminated

    def after_step(self) -> None:
        self._done = self.trainer.iter
        if self._agree_to_stop():
            self._state.gather()
            self._stop()
        alone = comm.get_world_size() == 1
        self._evaluating = self._evaluates_next()
        self._at_once = alone or (self._evaluating and comm.is_main_process())
        if self._at_once and self.asked:  # meanwhile
            self._handle()

    def after_evaluation(self) -> None:
        self._evaluating = False
        self._at_once = comm.get_world_size() == 1

    def stops_before_final_evaluation(self) -> bool:
        """Whether the run has been stopped, also after its last step; call it in every process when
        training ends. From then on SIGTERM does what it did before."""
        self.after_train()
        if not self.stopped and self.trainer.iter >= self._last:
            self.stopped = any(comm.all_gather(self.asked))
            if self.stopped:
                logger.warning("SIGTERM: stopped before the final evaluation; --resume does it")
        return self.stopped

    def is_reason_of(self, error: Exception) -> bool:
        """Whether an error between two steps comes from stopping."""
        if self.stopped:  # code in C++ that was being run has replaced the exception
            return True
        if self.asked and not comm.is_main_process():
            logger.warning(f"SIGTERM: stopped while the processes were ending: {error}")
            return True
        return False

    def _agree_to_stop(self) -> bool:
        done = self._done + 1
        if comm.get_world_size() == 1:
            return self.asked
        if done % _AGREE_PERIOD and done < self._last and not self._evaluates_next():
            return False
        return any(comm.all_gather(self.asked))

    @property
    def _last(self) -> int:
        return self.trainer.max_iter

    def _evaluates_next(self) -> bool:
        done = self._done + 1
        return 0 < self._eval_period and done % self._eval_period == 0 and done < self._last

    def _handle(self, *_) -> None:
        if os.getpid() != self._pid:  # forked with this handler
            die_by_signal(signal.SIGTERM)
            return
        again, self.asked = self.asked, True
        if self._at_once:
            self._at_once = False
            self._stop(together=False)
        elif self._evaluating and again and not comm.is_main_process():
            # torch sends the second one, when the main process has ended.
            raise Terminated

    def _stop(self, together: bool = True) -> None:
        save_iteration(self.trainer, self._checkpointer, self._done)
        if together:
            comm.synchronize()
        self.stopped = True
        logger.warning(
            f"SIGTERM: stopped after iteration {self._done}; --resume goes on from "
            f"{self._checkpointer.get_checkpoint_file()}"
        )
        raise Terminated


class _Evaluated(HookBase):
    def __init__(self, termination: Termination):
        self._termination = termination

    def after_step(self) -> None:
        self._termination.after_evaluation()


def die_by_signal(number: int) -> None:
    """Let a signal do to this process what it does without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


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
        inner = inner.dataset
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


def end_with_parent(grace: float = 10.0) -> None:
    """End this process when the one that has started it dies, as with ``kill -9``; does nothing in
    a process that ``multiprocessing`` hasn't started.

    torch sends such a process an interrupt, once, which Python drops if it arrives in a callback
    that can't raise: then it would train on, and the other machines with it.

    Args:
        grace: seconds for an end in good order.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        time.sleep(grace)
        logger.error("The process that has started this one is gone; stopping")
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


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


def message_in_traceback(text: str, *kinds: type) -> str:
    """The message of the last error of one of these kinds in a traceback, or ""."""
    for kind in kinds:
        _, found, message = text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
        if found:
            return message.strip()
    return ""
