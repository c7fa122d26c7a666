"""Runs as child processes: skipped, resumed, moved aside, or failing loudly."""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time

import pytest
from test_cards import Coco, Voc

from crosskd_ifc.common import config_files
from crosskd_ifc.config import ConfigError
from crosskd_ifc.experiments import executors, run_training, runs
from crosskd_ifc.experiments.child_process import RunFailed, RunStopped, StepCounter, supervise
from crosskd_ifc.experiments.runs import Run

# Stands for tools/train_net.py: notes its arguments, and leaves what a finished run leaves.
SCRIPT = """
import json, os, sys
folder = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
with open(os.path.join(folder, "calls.json"), "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
if os.path.exists(os.path.join(folder, "fail")):
    sys.exit("the disk is on fire")
if os.path.exists(os.path.join(folder, "nan")):
    with open(os.path.join(folder, "diverged.json"), "w") as f:
        f.write('{"iteration": 7}')
    sys.exit("FloatingPointError")
lines = [{"iteration": 9, "time": 0.5}]
tests = eval(sys.argv[sys.argv.index("DATASETS.TEST") + 1]) if "DATASETS.TEST" in sys.argv else ()
for i, name in enumerate(tests or [""]):
    key = name + "/bbox/AP" if len(tests) > 1 else "bbox/AP"
    last = 8 if os.environ.get("FULL_DISK") else 100000
    for iteration, ap in ((4, 7.5 + i), (9, 8.5 + i), (last, 12.5 + i)):
        ap = float("nan") if "SEED" in sys.argv and "13" in sys.argv else ap
        lines.append({"iteration": iteration, key: ap, key + "50": ap + 17.5})
with open(os.path.join(folder, "metrics.json"), "a") as f:
    f.writelines(json.dumps(line) + "\\n" for line in lines if not os.environ.get("NO_METRICS"))
"""


@pytest.fixture
def train(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return lambda run, **options: run_training.train(run, str(script), **options)


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


@pytest.mark.parametrize(
    "jobs, num_gpus, visible, slots",
    [
        (2, 1, None, ["0", "1"]),
        (6, 1, "4,5,6,7", ["4", "5", "6", "7", "4", "5"]),
        (2, 2, "4,5,6,7", ["4,5", "6,7"]),
        (3, 3, None, ["0,1,2"] * 3),
        (1, 1, None, []),
        (2, 8, None, []),
        (2, 0, None, []),
    ],
)
def test_runs_at_once_share_out_the_gpus(jobs, num_gpus, visible, slots, monkeypatch):
    monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert executors.gpu_slots(jobs, num_gpus) == slots
    monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: 1)
    assert executors.gpu_slots(jobs, num_gpus) == []


@pytest.mark.parametrize("device, shared", [(None, 1), ("cuda", 1), ("cuda:1", 0), ("cpu", 0)])
def test_gpus_are_shared_out_unless_one_is_named(device, shared, monkeypatch):
    monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: 4)
    parser = argparse.ArgumentParser()
    executors.add_executor_options(parser)
    args = parser.parse_args(["--jobs", "2", *(("--device", device) if device else ())])
    found = executors.train_by(args, "runs")
    assert isinstance(found, executors.TrainOnOwnGpus) == bool(shared)


def test_a_run_sees_the_gpus_of_its_slot_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("sys.argv[1:])", "os.environ['CUDA_VISIBLE_DEVICES'])"))
    train = executors.TrainOnOwnGpus(["4,5", "6"])
    for name in ("a", "b", "c"):
        train(make_run(tmp_path / name), str(script))
    assert [calls(tmp_path / name) for name in ("a", "b", "c")] == [["4,5"], ["6"], ["4,5"]]


def test_a_folder_that_can_not_be_locked_is_told_and_used(train, tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert train(make_run(tmp_path / "run"))["AP"] == 12.5
    assert "can't be locked ([Errno 38] Function not implemented)" in caplog.text


def test_an_interrupted_run_is_resumed_in_its_folder(train, tmp_path):
    folder = tmp_path / "run"
    train(make_run(folder))
    os.remove(folder / "run.json")
    train(make_run(folder))
    assert len(calls(folder)) == 2 and all("--resume" in c for c in calls(folder))


def test_a_run_names_the_versions_that_its_starts_had(train, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (tmp_path / "fail").touch()
    for commit in ("old", "old", "new"):
        found = {"torch": "1", "crosskd_ifc": commit}
        monkeypatch.setattr(run_training, "versions", lambda found=found: found)
        done = train(make_run(folder))
        os.remove(folder / "run.json")
    assert done["versions"] == {"torch": "1", "crosskd_ifc": "old, then new"}


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


def test_a_loss_that_is_not_finite_is_a_result_where_it_may_be(train, tmp_path):
    folder = tmp_path / "run"
    train(make_run(folder))
    os.remove(folder / "run.json")
    (folder / "fail").touch()
    (folder / "diverged.json").write_text('{"iteration": 7}')
    may = dataclasses.replace(make_run(folder), may_diverge=True)
    with pytest.raises(RunFailed):  # that file was an earlier start's
        train(may)
    (folder / "fail").unlink()
    (folder / "nan").touch()
    with pytest.raises(RunFailed):
        train(make_run(folder))
    done = train(may)
    assert (done["AP"], done["AP50"], done["diverged"], done["iterations"]) == (0, 0, 7, 7)
    assert "weights_sha256" not in done and may.result() == done


def test_several_test_sets_are_told_apart(train, tmp_path):
    names = "('crosskd_shapes_test', 'crosskd_shapes_val')"
    done = train(make_run(tmp_path / "run", "DATASETS.TEST", names))
    assert (done["AP"], done["AP50"]) == (12.5, 30.0)
    assert list(done["splits"]) == ["crosskd_shapes_test", "crosskd_shapes_val"]
    validation = done["splits"]["crosskd_shapes_val"]
    assert (validation["AP"], validation["AP50"]) == (13.5, 31.0)
    assert validation["curve"] == [[5, 8.5], [10, 13.5]]


def test_a_model_that_detects_nothing_has_an_ap_of_0(train, tmp_path):
    done = train(make_run(tmp_path / "run", "SEED", "13"))
    assert (done["AP"], done["AP50"]) == (0, 0)


def test_a_run_without_an_evaluation_has_failed(train, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_METRICS", "1")
    with pytest.raises(RunFailed, match="no bbox/AP in .*metrics.json"):
        train(make_run(tmp_path / "run"))


def test_an_evaluation_in_between_is_not_taken_for_the_last(train, tmp_path, monkeypatch):
    monkeypatch.setenv("FULL_DISK", "1")
    with pytest.raises(RunFailed, match="no bbox/AP after the last step.*start this again"):
        train(make_run(tmp_path / "run", "SOLVER.MAX_ITER", "20"))
    monkeypatch.delenv("FULL_DISK")
    assert train(make_run(tmp_path / "run", "SOLVER.MAX_ITER", "20"))["AP"] == 12.5


def test_a_result_tells_where_it_was_made(train, tmp_path):
    done = train(make_run(tmp_path / "run"), threads=1)
    assert set(done["versions"]) == {
        "python",
        "torch",
        "torchvision",
        "detectron2",
        "crosskd_ifc",
    }
    assert "CPU core" in done["hardware"] and "(1 for a run)" in done["hardware"]


def test_what_does_not_change_results_does_not_change_the_digest(tmp_path):
    plain = make_run(tmp_path)
    same = make_run(tmp_path, "MODEL.DEVICE", "cuda", "SOLVER.CHECKPOINT_PERIOD", "7")
    assert same.digest() == plain.digest()
    # The student distils nothing.
    assert make_run(tmp_path, "MODEL.CROSSKD.LOSS.CLS_WEIGHT", "2.0").digest() == plain.digest()
    assert make_run(tmp_path, "SOLVER.BASE_LR", "0.5").digest() != plain.digest()


def run_on_a_card(folder, data, name):
    """A run that trains and tests on the first split of a card."""
    opts = ["DATASETS.CARDS", f"('{data.card}',)", "DATASETS.TRAIN", f"('{name}',)"]
    return make_run(folder, *opts, "DATASETS.TEST", f"('{name}',)")


def write_coco(data):
    (data.root / "train.json").write_text(json.dumps(data.json))


def test_changed_annotations_make_another_run(train, tmp_path):
    data = Coco(tmp_path)
    write_coco(data)
    run = run_on_a_card(tmp_path / "run", data, "tinyco_train")
    first = train(run)
    assert run.result() == first
    data.json["annotations"][0]["bbox"][2] -= 1
    write_coco(data)
    assert run.result() is None
    train(run)
    assert len(calls(tmp_path / "run.old1")) == 1 and len(calls(tmp_path / "run")) == 1
    (data.root / "train.json").unlink()  # as in a fresh clone: what is recorded counts
    assert run.result() is not None


def test_changed_voc_annotations_or_other_images_make_another_run(tmp_path):
    data = Voc(tmp_path)
    run = run_on_a_card(tmp_path / "run", data, "tiny_train")
    found = [run.inputs()]
    label = sorted((data.root / "Annotations").iterdir())[0]
    label.write_text(label.read_text().replace("</annotation>", " </annotation>"))
    found.append(run.inputs())
    names = data.root / "ImageSets" / "Main" / "train.txt"
    names.write_text("".join(names.read_text().splitlines(True)[:-1]))
    found.append(run.inputs())
    assert len(set(found)) == 3 and None not in found


def test_how_a_card_is_written_and_where_it_lies_does_not_matter(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        data = Coco(folder)
        write_coco(data)
        run = run_on_a_card(tmp_path / "run", data, "tinyco_train")
        found.append((run.digest(), run.inputs()))
    data.card.write_text("# These are rods.\n" + data.card.read_text())
    found.append((run.digest(), run.inputs()))
    assert len(set(found)) == 1 and all(found[0])
    classes = Coco(tmp_path / "c", classes=["rod", "cell"])
    write_coco(classes)
    assert run_on_a_card(tmp_path / "run", classes, "tinyco_train").inputs() != found[0][1]


def test_other_weights_of_a_given_teacher_make_another_run(train, tmp_path):
    weights = tmp_path / "teacher.pth"
    weights.write_text("first")
    opts = ["MODEL.CROSSKD.TEACHER.WEIGHTS", str(weights)]
    run = Run("a run", "quick/crosskd_ifc_R_18_shapes.yaml", str(tmp_path / "run"), opts)
    assert train(run) == run.result()
    weights.write_text("others")
    assert run.result() is None


@pytest.mark.parametrize("place", ["", "../", "files/"])
def test_a_folder_whose_config_names_files_in_it_can_be_moved(place, tmp_path, monkeypatch):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b" / "b"):
        configs = folder / "configs"
        for name in (configs / "config.yaml", configs / place / "own.py"):
            name.parent.mkdir(parents=True, exist_ok=True)
        for name in ("own.py", "teacher.pth"):
            (configs / place / name).write_text("")
        (configs / place / "teacher.yaml").write_text("MODEL: {CROSSKD: {IMPORTS: [own.py]}}")
        files = {"CONFIG_FILE": f"{place}teacher.yaml", "WEIGHTS": f"{place}teacher.pth"}
        kd = {"IMPORTS": [f"{place}own.py"], "TEACHER": files}
        start = str(configs / place / "teacher.pth")
        model = {"META_ARCHITECTURE": "CrossKDRCNN", "WEIGHTS": start, "CROSSKD": kd}
        (configs / "config.yaml").write_text(json.dumps({"MODEL": model}))
        for current in (tmp_path, configs):  # from there the names are as they are written
            monkeypatch.chdir(current)
            run = Run("a run", str(configs / "config.yaml"), "run")
            found.append((run.digest(), run.inputs()))
    assert len(set(found)) == 1 and all(found[0])
    (configs / place / "teacher.pth").write_text("others")
    assert run.inputs() != found[0][1]


def test_other_weights_to_start_from_make_another_run(train, tmp_path):
    weights = tmp_path / "R-18.pth"
    weights.write_text("first")
    run = make_run(tmp_path / "run", "MODEL.WEIGHTS", str(weights))
    assert train(run) == run.result()
    weights.write_text("others")
    assert run.result() is None
    weights.unlink()  # as in a fresh clone: what is recorded counts
    assert run.result() is not None


def test_a_new_version_of_the_built_in_data_makes_another_run(train, tmp_path, monkeypatch):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path, "DATASETS.TRAIN", "('few',)")
    other.opts += ["DATASETS.TEST", "('few',)"]
    before = run.inputs(), other.inputs()
    # of all that was recorded with the first version
    assert before[0] == hashlib.sha256(b"{}").hexdigest() == before[1]
    assert train(run) == run.result()
    monkeypatch.setattr(runs.shapes, "VERSION", 2)
    assert run.result() is None and run.inputs() != before[0] and other.inputs() == before[1]


def test_settings_that_depend_on_the_number_of_gpus_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="a run: SOLVER.REFERENCE_WORLD_SIZE is 8; .*set it to 0"):
        make_run(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", "8").cfg()


def test_a_config_is_read_once_until_it_is_trained(train, tmp_path, monkeypatch):
    read, load = [], runs.load_config
    monkeypatch.setattr(runs, "load_config", lambda *a, **k: read.append(a) or load(*a, **k))
    run = make_run(tmp_path / "run")
    assert run.cfg() is run.cfg() and run.digest() and len(read) == 1
    run.opts += ["SOLVER.MAX_ITER", "11"]
    assert run.cfg().SOLVER.MAX_ITER == 11 and len(read) == 2
    config = tmp_path / "config.yaml"
    config.write_text(run.cfg().dump())
    run = Run("a run", str(config), str(tmp_path / "other"))
    before = run.digest()
    config.write_text(config.read_text().replace("MAX_ITER: 11", "MAX_ITER: 12"))
    assert train(run)["iterations"] == 12 and run.digest() == before


def test_progress_reads_only_what_is_new(tmp_path):
    file = tmp_path / "metrics.json"
    counter = StepCounter(str(file), 50)
    assert counter.look() == (0, 50, 0.0)
    file.write_text('{"iteration": 19, "time": 0.5}\n{"iteration": 39, "ti')
    assert counter.look() == (20, 50, 0.5)
    file.write_text(
        "x" * len('{"iteration": 19, "time": 0.5}\n') + '{"iteration": 39, "time": 7}\n'
    )
    assert counter.look() == (40, 50, 7)  # what was read before isn't looked at
    with open(file, "a") as f:
        f.write('broken\n{"iteration": 59, "bbox/AP": 1.0}\n')
    assert counter.look() == (50, 50, 7)
    file.write_text('{"iteration": 0, "time": 3}\n')  # it began anew
    assert counter.look() == (1, 50, 3)


def test_a_run_has_time_to_save_before_it_is_killed(tmp_path):
    """Several processes look for a signal at every tenth step."""
    counter = StepCounter(str(tmp_path / "metrics.json"), 50)
    assert counter.grace() >= 60
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "time": 12.0}\n')
    counter.look()
    assert counter.grace() >= 60 + 10 * 12


SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(2)
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("grace, status", [(30, 3), (0.2, -signal.SIGKILL)])
def test_a_stopped_process_is_killed_only_after_its_grace(grace, status, tmp_path):
    ready, stop = tmp_path / "ready", threading.Event()
    with open(tmp_path / "log", "wb") as log:
        found, _ = supervise(
            [sys.executable, "-c", SAVES, str(ready)],
            log,
            0,
            stop,
            every_second=lambda: ready.exists() and stop.set(),
            grace=lambda: grace,
        )
    assert found == status


@pytest.mark.parametrize(
    "config, name",
    [
        ("crosskd_ifc_R_18_shapes", "none"),
        ("crosskd_ifc_retinanet_R_18_shapes", "mean"),
        ("options/student_head_R_18_shapes", "mean"),  # unused, as its first records have it
    ],
)
def test_a_fusion_that_is_left_open_is_the_one_that_is_taken(config, name, tmp_path):
    found = {
        Run(
            "", f"quick/{config}.yaml", str(tmp_path), ["MODEL.CROSSKD.FUSION.NAME", value]
        ).digest()
        for value in ("", name)
    }
    assert len(found) == 1


def test_the_digest_changes_with_a_default_but_not_with_a_new_key(tmp_path, monkeypatch):
    def digest():
        return Run("a run", "quick/crosskd_ifc_R_18_shapes.yaml", str(tmp_path)).digest()

    before, add = digest(), config_files.add_crosskd_ifc_config

    def with_new_key(cfg):
        add(cfg)
        cfg.MODEL.CROSSKD.LOSS.NEW_WEIGHT = 0.0
        cfg.MODEL.NEW = "new"

    monkeypatch.setattr(config_files, "add_crosskd_ifc_config", with_new_key)
    assert digest() == before

    def with_new_default(cfg):
        add(cfg)
        cfg.MODEL.CROSSKD.LOSS.CLS_WEIGHT = 0.25

    monkeypatch.setattr(config_files, "add_crosskd_ifc_config", with_new_default)
    assert digest() != before


def test_a_weight_of_0_and_one_of_1_on_the_combined_feature_are_two_runs(tmp_path):
    def digest(weight, config="quick/options/taps_R_18_shapes.yaml"):
        opts = ["MODEL.CROSSKD.LOSS.FUSED_WEIGHT", str(weight)]
        return Run("a run", config, str(tmp_path), opts).digest()

    assert len({digest(weight) for weight in (0.0, 0.5, 1.0)}) == 3
    plain = "quick/crosskd_ifc_R_18_shapes.yaml"
    assert digest(1.0, plain) == Run("a run", plain, str(tmp_path)).digest()


def test_results_from_before_the_route_could_be_left_open_stay_valid(tmp_path):
    def digest(*opts):
        return Run("a run", "quick/crosskd_R_18_shapes.yaml", str(tmp_path), opts).digest()

    route = "MODEL.CROSSKD.FUSION.ROUTE"
    assert digest() == digest(route, "direct") != digest(route, "through")
    taps = (
        "MODEL.CROSSKD.FUSION.IN_FEATURES",
        "('pool', 'fc1')",
        "MODEL.CROSSKD.FUSION.ENTRY",
        "fc2",
    )
    assert digest(*taps) != digest(*taps, route, "direct")
    alone = ("MODEL.CROSSKD.FUSION.IN_FEATURES", "('fc1',)", "MODEL.CROSSKD.FUSION.ENTRY", "")
    assert digest(*alone) == digest(*alone, route, "through") != digest(*alone, route, "direct")


def test_results_from_before_there_were_types_of_losses_stay_valid(tmp_path, monkeypatch):
    run = Run("a run", "quick/options/pkd_R_18_shapes.yaml", str(tmp_path))
    other = Run("a run", "quick/options/cwd_R_18_shapes.yaml", str(tmp_path))
    before, add = run.digest(), config_files.add_crosskd_ifc_config
    assert other.digest() != before

    def of_then(cfg):
        add(cfg)
        for key in ("CLS_TYPE", "CLS_OPTS", "FEATURE_TYPE", "FEATURE_OPTS"):
            del cfg.MODEL.CROSSKD.LOSS[key]

    monkeypatch.setattr(config_files, "add_crosskd_ifc_config", of_then)
    assert run.digest() == before


def test_a_stopped_run_ends_its_process_and_goes_on_later(train, tmp_path):
    run, stop = make_run(tmp_path / "run"), threading.Event()
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")

    with pytest.raises(RunStopped):
        options = dict(stop=stop, on_progress=lambda *_: stop.set())
        run_training.train(run, str(tmp_path / "slow.py"), **options)
    first = json.loads((tmp_path / "run" / "started.json").read_text())["seconds"]
    assert 0 < first < 30
    assert train(run)["seconds"] > first


def test_ctrl_c_in_a_terminal_lets_a_training_save(tmp_path):
    """A terminal sends it to all processes of its foreground group."""
    (tmp_path / "train.py").write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def end(number, _):\n"
        "    (here / 'ended').write_text(signal.Signals(number).name)\n"
        "    sys.exit()\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, end)\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    tool = os.fork()
    if not tool:
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
            with open(os.devnull, "wb") as log:
                command = [sys.executable, str(tmp_path / "train.py")]
                look = (tmp_path / "looked").touch
                supervise(command, log, 0, None, every_second=look, grace=lambda: 30)
        finally:
            os._exit(0)
    for _ in range(1200):
        if (tmp_path / "started").exists() and (tmp_path / "looked").exists():
            break
        time.sleep(0.05)
    os.killpg(tool, signal.SIGINT)
    os.waitpid(tool, 0)
    assert (tmp_path / "ended").read_text() == "SIGTERM"


def test_two_processes_do_not_train_in_one_folder(train, tmp_path, caplog):
    run, stop = make_run(tmp_path / "run"), threading.Event()
    (tmp_path / "run").mkdir()
    stop.set()
    with open(tmp_path / "run" / "console.log", "ab") as log:  # what a child of a killed tool holds
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(RunStopped):
            train(run, stop=stop)
    assert "waiting for the process that trains in" in caplog.text
    assert train(run)["AP"] == 12.5


def test_the_mean_of_a_cascades_stages_and_its_first_are_two_runs(tmp_path):
    key = "MODEL.CROSSKD.TEACHER."
    cascade = (key + "CONFIG_FILE", "quick/cascade_rcnn_R_34_shapes.yaml", key + "WEIGHTS", "x.pth")

    def digest(*opts, of=cascade):
        config = "quick/crosskd_ifc_R_18_shapes.yaml"
        return Run("a run", config, str(tmp_path), [*of, *opts]).digest()

    assert digest(key + "STAGE", "mean") == digest() != digest(key + "STAGE", "1")
    lazy = tmp_path / "cascade.py"
    name = "detectron2.modeling.roi_heads.CascadeROIHeads"
    lazy.write_text(f"model = dict(roi_heads=dict(_target_='{name}'))\n")
    of = (key + "CONFIG_FILE", str(lazy), *cascade[2:])
    assert (
        digest(key + "STAGE", "mean", of=of) == digest(of=of) != digest(key + "STAGE", "1", of=of)
    )
    assert digest(of=()) == digest(key + "STAGE", "1", of=()), "of a Faster R-CNN both are its head"


def test_other_weights_of_any_of_several_teachers_make_another_run(tmp_path):
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for file in files:
        file.write_text("first")
    opts = ["MODEL.CROSSKD.TEACHERS", repr([{"WEIGHTS": str(file)} for file in files])]
    run = Run("a run", "quick/crosskd_ifc_R_18_shapes.yaml", str(tmp_path / "run"), opts)
    found = [run.inputs()]
    for file in files:
        file.write_text("others")
        found.append(run.inputs())
    assert len(set(found)) == 3 and None not in found


def test_changed_annotations_of_the_test_images_make_another_run(tmp_path):
    data = Voc(tmp_path)
    run = run_on_a_card(tmp_path / "run", data, "tiny_train")
    run.opts += ["DATASETS.TEST", "('tiny_val',)"]
    before, label = run.inputs(), data.root / "Annotations" / "d.xml"
    label.write_text(label.read_text().replace("</annotation>", " </annotation>"))
    assert None not in (before, run.inputs()) and run.inputs() != before


def test_statistics_are_means_over_the_last_quarter():
    lines = [{"iteration": i, "crosskd/x": float(i)} for i in (0, 25, 50, 75, 100)]
    assert run_training._statistics(lines) == {"x": 87.5}


def test_a_result_is_of_the_files_that_its_training_started_with(train, tmp_path):
    weights = tmp_path / "R-18.pth"
    weights.write_text("first")
    run = make_run(tmp_path / "run", "MODEL.WEIGHTS", str(weights))
    train(run, on_progress=lambda *_: weights.write_text("changed later"))
    assert run.result() is None


def test_a_run_that_another_process_has_ended_meanwhile_is_not_repeated(
    train, tmp_path, monkeypatch
):
    folder, claim = tmp_path / "run", run_training.claim_folder

    def after_the_other(*args, **options):
        monkeypatch.setattr(run_training, "claim_folder", claim)
        train(make_run(folder))
        return claim(*args, **options)

    monkeypatch.setattr(run_training, "claim_folder", after_the_other)
    train(make_run(folder))
    assert len(calls(folder)) == 1
