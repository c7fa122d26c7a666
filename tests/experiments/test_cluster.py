"""Runs as jobs of submitit, by its local executor: the same code as on a cluster."""

import json
import os
import signal
import threading
import time

import pytest
from test_comparison import Case

from crosskd_ifc import ConfigError
from crosskd_ifc.experiments.executors import add_executor_options, threads_of, train_by

pytest.importorskip("submitit")

# In place of tools/train_net.py, first: says how it was called; as long as "slow" is there it waits
# to be told to end.
FIRST = """
import os, sys, time
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
root = os.path.dirname(os.path.dirname(folder))
with open(os.path.join(root, "parents"), "a") as f:
    f.write(f"{os.getppid()}\\n")
with open(os.path.join(root, "calls"), "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
while os.environ.get("BOTH") and len(open(os.path.join(root, "calls")).readlines()) < 2:
    time.sleep(0.1)
while os.path.exists(os.path.join(root, "slow")):
    time.sleep(0.1)
"""


def options(*words):
    import argparse

    parser = argparse.ArgumentParser()
    add_executor_options(parser)
    return parser.parse_args(words)


@pytest.fixture
def case(tmp_path, monkeypatch):
    # Of the jobs' processes, which know nothing of pytest's settings.
    here = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.path.join(here, "..", "..", "projects"))
    case = Case(tmp_path, ablations=None, arms={"student": {"config": PLAIN}}, teacher=None)
    script = tmp_path / "script.py"
    script.write_text(FIRST + script.read_text())
    return case


PLAIN = "quick/faster_rcnn_R_18_shapes.yaml"


def local(case, *words):
    return train_by(options("--executor", "local", "--device", "cpu", *words), str(case.folder))


def calls(case):
    path = case.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_jobs_give_the_results_of_child_processes_and_tell_why_they_fail(case, monkeypatch):
    monkeypatch.setenv("FAILING", "student_2")
    case.jobs = 2
    failed = case.do(train=local(case))
    assert set(failed) == {("student", 2)} and "the disk is on fire" in failed["student", 2]
    monkeypatch.delenv("FAILING")
    assert case.do() == {}
    by_job, by_child = (case.recorded()["student", seed] for seed in (1, 2))
    assert set(by_job) == set(by_child) and (by_job["AP"], by_child["AP"]) == (11, 12)
    assert len(calls(case)) == 3 and "num-machines" not in calls(case)[0]


@pytest.mark.slow
def test_a_run_on_two_machines_starts_on_each_with_one_address(case, monkeypatch):
    monkeypatch.setenv("BOTH", "1")
    todo = [("student", 1)]
    assert case.do(todo, train=local(case, "--num-machines", "2")) == {}
    assert len(calls(case)) == 2
    words = [dict(zip(x.split(), x.split()[1:])) for x in calls(case)]
    assert [w["--num-machines"] for w in words] == ["2", "2"]
    assert {w["--machine-rank"] for w in words} == {"0", "1"}
    (address,) = {w["--dist-url"] for w in words}
    assert address.startswith("tcp://127.0.0.1:")


def test_a_preempted_job_is_ended_and_goes_on_and_a_stopped_one_ends(case):
    train, jobs = local(case), []
    submit = train._executor.submit
    train._executor.submit = lambda *args: jobs.append(submit(*args)) or jobs[-1]
    slow, found = case.folder / "slow", {}
    slow.touch()
    work = threading.Thread(target=lambda: found.update(case.do([("student", 1)], train=train)))
    work.start()
    wait_for(lambda: len(calls(case)) == 1)
    job = int((case.folder / "parents").read_text())
    os.kill(job, signal.SIGUSR2)  # as a cluster preempts
    wait_for(lambda: len(calls(case)) == 2)
    slow.unlink()
    work.join(120)
    assert found == {} and case.recorded()["student", 1]["AP"] == 11
    assert calls(case)[0] == calls(case)[1]
    slow.touch()
    stop = threading.Event()
    run, script = case.runs["student", 2], str(case.folder / "script.py")

    def until_told(*_):
        if len(calls(case)) == 3:
            stop.set()

    with pytest.raises(RuntimeError, match="student, seed 2 was stopped"):
        train(run, script, stop=stop, on_progress=until_told)
    assert jobs[-1].done() and os.listdir(run.folder)
    started = json.loads((case.folder / "runs" / "student_2" / "started.json").read_text())
    assert started["seconds"] > 0  # written when the process had ended
    assert not list((case.folder / "runs").glob("**/*stop_requested"))


def test_options_that_can_not_work_are_refused(case):
    for words in (["--num-machines", "2"], ["--cluster", "timeout_min=3"]):
        with pytest.raises(ConfigError, match="need --executor"):
            train_by(options(*words), str(case.folder))
    with pytest.raises(ConfigError, match="--executor slurm: .*srun"):
        train_by(options("--executor", "slurm"), str(case.folder))
    with pytest.raises(ConfigError, match="--cluster 'gpu': expected KEY=VALUE"):
        local(case, "--cluster", "gpu")
    for words in (["no_such=1"], ["timeout_min=abc"], ["timeout_min=3", "cpus_per_task=x"]):
        with pytest.raises(ConfigError, match=f"--cluster {' '.join(words)}: "):
            local(case, "--cluster", *words)


def test_threads_are_shared_by_child_processes_and_the_clusters_by_default():
    assert threads_of(options("--jobs", "1000")) == 1
    assert threads_of(options("--executor", "slurm")) == 0
    assert threads_of(options("--executor", "slurm", "--threads", "4")) == 4
    assert threads_of(options("--threads", "0")) == 0  # as many as torch likes
