"""Starting a run's processes so that SIGTERM stops them all, whenever it comes."""

import multiprocessing
import os
import signal
from typing import Any, List

from torch.multiprocessing import ProcessExitedException

from .preemption import Terminated, die_by_signal

_AGAIN = 0.1  # seconds


class PassOnSigterm:
    """Within this context, SIGTERM ends this process as long as it has started no others; then it
    is passed on to them, and this process ends as they do."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._launching = self._asked = False
        self._told: List[Any] = []

    def launching(self) -> None:
        """From now on there are processes, or soon will be."""
        self._launching = True

    def __enter__(self) -> "PassOnSigterm":
        numbers = signal.SIGTERM, signal.SIGALRM
        self._previous = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """
        Raises:
            Terminated: instead of any error, if a process has ended so, or before it could tell
                SIGTERM from its default.
        """
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if not self._asked:
            return
        early = isinstance(error, ProcessExitedException) and error.exit_code == -signal.SIGTERM
        # Of several that have ended, torch reports any: one may have lost its connection.
        if early or any(p.exitcode == Terminated.status for p in self._told):
            raise Terminated from None

    def _handle(self, number: int, _: Any) -> None:
        if os.getpid() != self._pid:  # forked with this handler
            die_by_signal(number)
            return
        self._asked = True
        if not self._launching:
            raise Terminated
        children = multiprocessing.active_children()
        for process in children:
            process.terminate()
        self._told += children
        if not children:  # none is there yet
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
