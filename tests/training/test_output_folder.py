"""OUTPUT_DIR belongs to one training."""

import errno
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from crosskd_ifc import ConfigError
from crosskd_ifc.training.output_folder import check_output_folder, training_alone_in


def hold(folder, connection):
    with training_alone_in(folder):
        connection.send("held")
        connection.recv()


@pytest.fixture
def other(tmp_path):
    """A process that trains in tmp_path."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(tmp_path), there))
    process.start()
    assert here.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_second_training_is_refused_and_told_who_is_there(other, tmp_path):
    with pytest.raises(ConfigError) as refused:
        with training_alone_in(str(tmp_path)):
            raise AssertionError("it trains")
    who = rf"\(process {other.pid} on {re.escape(os.uname().nodename)}, since \d{{4}}-.* UTC\)"
    assert re.search(f"OUTPUT_DIR {tmp_path}: another training writes to it {who}", str(refused))


def test_a_second_search_does_not_touch_the_first_ones_trials(other, tmp_path, monkeypatch):
    tool = Path(__file__).resolve().parents[2] / "tools" / "tune.py"
    words = ["demo.yaml", "crosskd", "--budget", "1", "--log", "SOLVER.BASE_LR", "0.01", "0.1"]
    words[0] = str(tool.parents[1] / "benchmarks" / "protocols" / "demo.yaml")
    monkeypatch.setattr(sys, "argv", [str(tool), *words, "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"error: --output {tmp_path}: another search writes"):
        runpy.run_path(str(tool), run_name="__main__")
    assert [path.name for path in tmp_path.iterdir()] == [".training"]


def test_a_killed_training_keeps_nobody_out(other, tmp_path):
    other.kill()
    other.join()
    with training_alone_in(str(tmp_path)):
        assert f"process {os.getpid()} on" in (tmp_path / ".training").read_text()


def test_nor_do_data_loader_workers_that_outlive_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    with training_alone_in(str(tmp_path)):
        worker = fork.Process(target=multiprocessing.Event().wait)
        worker.start()
    check = fork.Process(target=enter, args=(str(tmp_path),))
    check.start()
    check.join()
    worker.kill()
    worker.join()
    assert check.exitcode == 0


def enter(folder):
    with training_alone_in(folder):
        pass


def test_a_file_system_without_locks_is_warned_of_and_trained_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with training_alone_in(str(tmp_path)):
        pass
    assert "can't be locked" in caplog.text and "No locks available" in caplog.text


@pytest.mark.parametrize("folder", ["", "file", "file/below", "/proc/run"])
def test_a_folder_that_cant_be_written_is_one_error(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^OUTPUT_DIR "):
        check_output_folder(folder)
