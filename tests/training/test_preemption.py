"""SIGTERM: in steps and in evaluations, alone and in one of two processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import answers_of_two
from torch.multiprocessing import ProcessExitedException, start_processes
from torch.utils.data import DataLoader

from crosskd_ifc.training import launching
from crosskd_ifc.training.preemption import (
    StopAfterStep,
    StoppableLoader,
    Terminated,
    keep_workers_on_sigterm,
    passing_on_sigterm,
    stop_if_asked,
    stopping_on_sigterm,
)


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # a handler runs between two instructions


def test_a_process_alone_stops_after_the_step_and_not_before():
    gathered = []
    hook = StopAfterStep(SimpleNamespace(gather=lambda: gathered.append(3)))
    hook.trainer = SimpleNamespace(iter=3, max_iter=100)
    with stopping_on_sigterm():
        hook.after_step()
        send_sigterm()
        with pytest.raises(Terminated) as stopped:
            hook.after_step()
    assert stopped.value.code == 143 and gathered == [3]


def test_an_evaluation_stops_after_the_batch():
    seen = []
    with stopping_on_sigterm(), pytest.raises(Terminated):
        for batch in StoppableLoader(DataLoader(range(9))):
            seen.append(int(batch))
            if batch == 4:
                send_sigterm()
    assert seen == [0, 1, 2, 3, 4]


def test_outside_a_training_sigterm_does_what_it_did():
    before = signal.getsignal(signal.SIGTERM)
    with stopping_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
        send_sigterm()
    assert signal.getsignal(signal.SIGTERM) == before
    stop_if_asked(1)  # of an earlier training
    assert [int(x) for x in StoppableLoader(DataLoader(range(3)))] == [0, 1, 2]


def stopping_in_two(folder, work):
    return answers_of_two(folder, stopping_on_sigterm()(work))


def steps(rank, told=1, at=13, last=35):
    """The step after which this process stops."""
    for done in range(1, last + 1):
        if rank == told and done == at:
            send_sigterm()
        try:
            stop_if_asked(done, last=done == last)
        except Terminated:
            return done


def late_steps(rank):
    return steps(rank, told=0, at=33)


def no_sigterm(rank):
    return steps(rank, told=None)


@pytest.mark.parametrize("work, stop", [(steps, 20), (late_steps, 35), (no_sigterm, None)])
def test_two_processes_stop_after_the_same_step_whoever_was_told(tmp_path, work, stop):
    assert stopping_in_two(tmp_path, work) == [stop, stop]


def batches(rank, told=True):
    """How many batches of its share a process evaluates."""
    seen = 0
    try:
        for _ in StoppableLoader(DataLoader(range(30 - rank))):
            seen += 1
            if told and rank == 1 and seen == 12:
                send_sigterm()
    except Terminated:
        return f"stopped after {seen}"
    return f"all {seen}"


def all_batches(rank):
    return batches(rank, told=False)


@pytest.mark.parametrize(
    "work, found", [(batches, ["stopped after 20"] * 2), (all_batches, ["all 30", "all 29"])]
)
def test_two_processes_stop_in_the_same_batch_of_an_evaluation(tmp_path, work, found):
    assert stopping_in_two(tmp_path, work) == found


def test_a_data_loaders_workers_end_on_their_parents_sigterm_alone():
    before = set(multiprocessing.active_children())
    loader = keep_workers_on_sigterm(DataLoader(range(50), num_workers=1, prefetch_factor=1))
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert [int(next(batches)) for _ in range(9)] == list(range(1, 10))
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


# The process that starts the others


def sleep(_, default):
    if not default:
        signal.signal(signal.SIGTERM, lambda *_: exit(143))
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(60)


def test_a_sigterm_before_there_are_processes_ends_the_one_that_would_start_them():
    with pytest.raises(Terminated):
        with passing_on_sigterm():
            send_sigterm()
            raise AssertionError("it went on")


@pytest.mark.parametrize("gpus", ["0", "1"])
def test_a_process_that_starts_no_others_is_ended_by_a_sigterm_at_its_start(gpus, monkeypatch):
    handlers = []
    monkeypatch.setattr(sys, "argv", ["train_net", "--num-gpus", gpus])
    earlier = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pytest-xdist has one of its own
    try:
        launching.invoke(
            lambda _: None, setup=lambda _: handlers.append(signal.getsignal(signal.SIGTERM))
        )
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert handlers == [signal.SIG_DFL]


@pytest.mark.parametrize("default", [True, False], ids=["default handler", "own handler"])
def test_a_sigterm_is_passed_on_and_the_process_ends_with_the_others(default):
    ready = signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Terminated):
            with passing_on_sigterm():
                start_processes(sleep, (default,), nprocs=1, start_method="spawn")
    finally:
        signal.signal(signal.SIGUSR1, ready)
    assert not multiprocessing.active_children()


def test_a_process_that_dies_by_itself_stays_an_error():
    with pytest.raises(ProcessExitedException):
        with passing_on_sigterm():
            start_processes(die, nprocs=1, start_method="fork")


def die(_):
    os._exit(7)
