"""Runs as child processes: skipped, resumed, moved aside, or failing loudly."""

import json
import os

import pytest

from crosskd_ifc import runs
from crosskd_ifc.runs import Run, RunFailed

# Stands for tools/train_net.py: notes its arguments, and leaves what a finished run leaves.
SCRIPT = """
import json, os, sys
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
with open(os.path.join(folder, "calls.json"), "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
if os.path.exists(os.path.join(folder, "fail")):
    sys.exit("the disk is on fire")
with open(os.path.join(folder, "metrics.json"), "a") as f:
    f.write(json.dumps({"iteration": 9, "time": 0.5}) + "\\n")
    f.write(json.dumps({"iteration": 10, "bbox/AP": 12.5, "bbox/AP50": 30.0}) + "\\n")
"""


@pytest.fixture
def train(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return lambda run: runs.train(run, str(script))


def make_run(folder, *opts, needs=()):
    opts = ["SOLVER.MAX_ITER", "10", *opts]
    return Run("a run", "quick/faster_rcnn_R_18_shapes.yaml", str(folder), opts, needs)


def calls(folder):
    with open(folder / "calls.json") as f:
        return [json.loads(line) for line in f]


def test_a_finished_run_is_not_trained_again(train, tmp_path):
    folder = tmp_path / "run"
    assert make_run(folder).result() is None
    first, second = train(make_run(folder)), train(make_run(folder))
    assert first == second and len(calls(folder)) == 1
    assert (first["AP"], first["AP50"], first["iterations"]) == (12.5, 30.0, 10)
    assert first["seconds_per_step"] == 0.5 and first["peak_memory_gb"] >= 0


def test_an_interrupted_run_is_resumed_in_its_folder(train, tmp_path):
    folder = tmp_path / "run"
    train(make_run(folder))
    os.remove(folder / "run.json")
    train(make_run(folder))
    assert len(calls(folder)) == 2 and all("--resume" in c for c in calls(folder))


def test_a_run_of_another_config_is_moved_aside_and_kept(train, tmp_path):
    folder = tmp_path / "run"
    train(make_run(folder))
    train(make_run(folder, "SEED", "7"))
    assert len(calls(folder)) == 1 and len(calls(tmp_path / "run.old1")) == 1
    assert (tmp_path / "run.old1" / "run.json").exists()


def test_a_student_is_trained_again_if_its_teacher_changed(tmp_path):
    digests = {
        make_run(tmp_path / "s", needs=[make_run(tmp_path / "t", "SEED", seed)]).digest()
        for seed in ("1", "2")
    }
    assert len(digests) == 2


def test_the_folder_does_not_belong_to_the_digest(tmp_path):
    assert make_run(tmp_path / "a").digest() == make_run(tmp_path / "b").digest()


def test_a_failing_run_shows_the_end_of_its_log_and_is_not_finished(train, tmp_path):
    folder = tmp_path / "run"
    train(make_run(folder))
    os.remove(folder / "run.json")
    (folder / "fail").touch()
    with pytest.raises(RunFailed, match="(?s)a run failed.*console.log.*disk is on fire"):
        train(make_run(folder))
    assert make_run(folder).result() is None
