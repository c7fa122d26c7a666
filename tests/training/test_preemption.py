"""SIGTERM at every moment of a run with several processes, seen from one of them."""

import contextlib
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, start_processes

from crosskd_ifc.training.checkpointer import SafeCheckpointer
from crosskd_ifc.training.launching import PassOnSigterm
from crosskd_ifc.training.preemption import Terminated, Termination


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # a handler runs between two instructions


class OneOfTwo:
    """The hook in one of two processes; what the other one has been told is in ``other``."""

    def __init__(self, monkeypatch, folder, rank):
        self.other, self.during_agreement = False, lambda: None
        self.gathered = []
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "is_main_process", lambda: rank == 0)
        monkeypatch.setattr(comm, "all_gather", self._all_gather)
        monkeypatch.setattr(comm, "synchronize", lambda: None)
        state = SimpleNamespace(gather=lambda: self.gathered.append(self.trainer.iter))
        checkpointer = SafeCheckpointer(torch.nn.Linear(1, 1), str(folder))
        self.hook = Termination(checkpointer, state, eval_period=15)
        self.trainer = SimpleNamespace(iter=0, max_iter=32, _trainer=SimpleNamespace())
        self.hook.trainer = self.trainer
        self.hook.before_train()

    def _all_gather(self, mine):
        self.during_agreement()
        return [mine, self.other]

    def step(self, iteration):
        self.trainer.iter = iteration
        self.hook.before_step()
        self.hook.after_step()


@pytest.fixture(params=[0, 1])
def process(request, monkeypatch, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    yield OneOfTwo(monkeypatch, tmp_path, request.param)
    signal.signal(signal.SIGTERM, handler)


def saved(folder):
    return sorted(p.name for p in folder.glob("*.pth"))


def test_one_of_two_processes_stops_together_with_the_other(process, tmp_path):
    process.step(5)
    send_sigterm()  # between two steps, where it mustn't stop alone
    process.step(6)
    assert saved(tmp_path) == []
    with pytest.raises(Terminated):
        process.step(9)
    assert process.gathered == [9]
    main = comm.is_main_process()
    assert saved(tmp_path) == (["model_0000009.pth"] if main else [])


def test_the_other_ones_sigterm_stops_this_process_too(process):
    process.other = True
    process.step(5)
    with pytest.raises(Terminated):
        process.step(9)


def test_a_sigterm_during_the_agreement_counts_in_the_next_one(process):
    process.during_agreement = send_sigterm
    process.step(9)
    process.during_agreement = lambda: None
    with pytest.raises(Terminated):
        process.step(14)  # before an evaluation


def test_in_an_evaluation_the_main_process_saves_at_once_and_the_others_follow(process, tmp_path):
    process.step(14)
    if not comm.is_main_process():
        send_sigterm()
        assert process.hook.is_reason_of(RuntimeError("Connection closed by peer"))
    with pytest.raises(Terminated):
        send_sigterm()
    assert saved(tmp_path) == (["model_0000014.pth"] if comm.is_main_process() else [])
    assert process.gathered == []  # nobody is waited for


def test_behind_an_evaluation_nobody_stops_alone_any_more(process, tmp_path):
    process.step(14)
    process.hook.evaluated.after_step()
    send_sigterm()
    send_sigterm()
    assert saved(tmp_path) == []
    with pytest.raises(Terminated):
        process.step(19)


@pytest.mark.parametrize("mine", [False, True])
def test_a_sigterm_after_the_last_step_stops_all_before_the_final_evaluation(process, mine):
    process.step(31)
    process.trainer.iter = 32
    if mine:
        send_sigterm()
    process.other = not mine
    assert process.hook.stops_before_final_evaluation()


def test_without_sigterm_the_final_evaluation_comes(process):
    process.step(31)
    process.trainer.iter = 32
    before = signal.getsignal(signal.SIGTERM)
    assert not process.hook.stops_before_final_evaluation()
    assert signal.getsignal(signal.SIGTERM) != before


# The process that starts the others


@contextlib.contextmanager
def forks_keep_a_sigterm():
    """Python forgets one that a forked process gets in its first moments; a spawned one, as in a
    training, dies of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def sleep(_, default):
    signal.signal(signal.SIGTERM, signal.SIG_DFL if default else lambda *_: exit(143))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    time.sleep(60)


def test_a_sigterm_before_there_are_processes_ends_the_one_that_would_start_them():
    with pytest.raises(Terminated):
        with PassOnSigterm():
            send_sigterm()
            raise AssertionError("it went on")


@pytest.mark.parametrize("default", [True, False], ids=["default handler", "own handler"])
def test_a_sigterm_before_the_first_process_is_there_is_passed_on_later(default):
    with pytest.raises(Terminated):
        with PassOnSigterm() as sigterm:
            sigterm.launching()
            send_sigterm()
            with forks_keep_a_sigterm():
                start_processes(sleep, (default,), nprocs=2, start_method="fork")
    assert not multiprocessing.active_children()


def test_a_forked_process_that_has_no_handler_of_its_own_yet_dies_of_a_sigterm():
    with PassOnSigterm() as sigterm:
        sigterm.launching()
        process = multiprocessing.get_context("fork").Process(target=send_sigterm)
        process.start()
        process.join(30)
    assert process.exitcode == -signal.SIGTERM


def test_a_process_that_dies_by_itself_stays_an_error():
    with pytest.raises(ProcessExitedException):
        with PassOnSigterm() as sigterm:
            sigterm.launching()
            start_processes(die, nprocs=1, start_method="fork")


def die(_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    send_sigterm()
