"""Runs that are stopped in every way, and go on as if they never had been."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import load_tool, tiny_cfg, tiny_model
from test_dense import dense_cfg, telling
from test_train_dense import settings
from test_train_net import TRAIN_NET, TRAINABLE

from crosskd_ifc import ConfigError
from crosskd_ifc.data.shapes import CLASSES, generate
from crosskd_ifc.training.checkpointer import CheckpointError

STEPS = 8
KINDS = ("RCNN", "RetinaNet", "FCOS")
CONCAT = ("MODEL.CROSSKD.FUSION.NAME", "concat")  # learned


@pytest.fixture(scope="module", autouse=True)
def no_jit():
    """detectron2's focal loss is compiled while it runs: a process computes its first steps with
    other rounding than the next ones, whether it was resumed or not."""
    os.environ["PYTORCH_JIT"] = "0"  # of the processes that are started here
    yield
    del os.environ["PYTORCH_JIT"]


def run(config, *arguments):
    words = ["--config-file", str(config), *map(str, arguments)]
    return load_tool("train_net").main(default_argument_parser().parse_args(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of wide and high pictures, its card, teachers and students of each kind."""
    folder = tmp_path_factory.mktemp("resume")
    generate(str(folder / "data"), num_images={"train": 7, "test": 2}, image_size=64, seed=3)
    crop_some(folder / "data" / "annotations" / "train.json", folder / "data" / "train")
    splits = {s: {"json": f"annotations/{s}.json", "images": s} for s in ("train", "test")}
    card = {"name": "resumeshapes", "format": "coco", "root": "data", "splits": splits}
    card |= {"classes": list(CLASSES), "evaluator": "coco"}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    for kind in KINDS:
        rcnn = kind == "RCNN"
        opts = TRAINABLE if rcnn else settings(kind)
        cfg = tiny_cfg(*opts, architecture="GeneralizedRCNN") if rcnn else None
        cfg = cfg or dense_cfg(kind, *opts, stock=True)
        (folder / f"{kind}_teacher.yaml").write_text(cfg.dump())
        teacher = tiny_model(cfg, seed=7) if rcnn else telling(build_model(cfg), 7)
        DetectionCheckpointer(teacher, str(folder)).save(f"{kind}_teacher")
        (folder / "last_checkpoint").unlink()
        student = {
            "MODEL.CROSSKD.TEACHER.CONFIG_FILE": str(folder / f"{kind}_teacher.yaml"),
            "MODEL.CROSSKD.TEACHER.WEIGHTS": str(folder / f"{kind}_teacher.pth"),
            "DATASETS.CARDS": (str(folder / "card.yaml"),),
            "DATASETS.TRAIN": ("resumeshapes_train",),
            "DATASETS.TEST": ("resumeshapes_test",),
            "DATALOADER.ASPECT_RATIO_GROUPING": True,
            "SOLVER.MAX_ITER": STEPS,
            "SOLVER.STEPS": (5,),
            "SOLVER.CHECKPOINT_PERIOD": 3,
            "TEST.EVAL_PERIOD": 3,
            "SEED": 5,
        }
        opts = (*opts, *CONCAT, *(x for pair in student.items() for x in pair))
        cfg = tiny_cfg(*opts) if rcnn else dense_cfg(kind, *opts)
        (folder / f"{kind}.yaml").write_text(cfg.dump())
    return folder


def crop_some(annotations, images):
    """Make every second picture higher than wide; its boxes reach over the border then."""
    from PIL import Image

    coco = json.loads(annotations.read_text())
    for record in coco["images"][::2]:
        path = images / record["file_name"]
        Image.open(path).crop((0, 0, 56, 64)).save(path)
        record["width"] = 56
    annotations.write_text(json.dumps(coco))


@pytest.fixture(scope="module")
def whole(folder):
    """kind -> the last checkpoint of a run that was never stopped."""
    made = {}

    def get(kind):
        if kind not in made:
            train(folder / f"{kind}.yaml", folder / f"whole_{kind}")
            made[kind] = load(folder / f"whole_{kind}")
        return made[kind]

    return get


@pytest.fixture
def finished(folder, whole, tmp_path):
    """kind -> a folder of this test's that holds a finished run."""

    def copy(kind):
        whole(kind)
        return shutil.copytree(folder / f"whole_{kind}", tmp_path / "run")

    return copy


def load(out, name="model_final"):
    return torch.load(out / f"{name}.pth", weights_only=True)


def assert_same_run(a, b):
    """Weights, adapters, momentum, schedule, random states: everything is equal to the bit."""
    assert a["iteration"] == b["iteration"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    assert flat(a["trainer"]) == flat(b["trainer"])


def flat(x):
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {k: flat(v) for k, v in x.items()}
    return [flat(v) for v in x] if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_from_a_checkpoint_ends_as_one_never_interrupted(
    folder, whole, finished, kind
):
    out = finished(kind)
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000002.pth")
    train(folder / f"{kind}.yaml", out)
    assert_same_run(load(out), whole(kind))
    assert any(k.startswith("fusion.") for k in load(out)["model"])
    normalizer = load(out)["trainer"]["hooks"]["ResumeState"]["loss_normalizer"]
    assert (normalizer is None) == (kind == "RCNN")


def test_so_does_a_run_with_a_teacher_drawn_in_each_step(folder, tmp_path):
    other = torch.load(folder / "RCNN_teacher.pth", weights_only=True)
    for tensor in other["model"].values():
        if tensor.is_floating_point():
            tensor *= 1.1
    torch.save(other, tmp_path / "other.pth")
    teachers = f"[{{}}, {{'WEIGHTS': '{tmp_path}/other.pth', 'EVAL_AT_START': True}}]"
    opts = ("MODEL.CROSSKD.TEACHERS", teachers, "MODEL.CROSSKD.TEACHERS_LOSS", "one")
    config, out = folder / "RCNN.yaml", tmp_path / "run"
    train(config, out, *opts)
    whole = load(out)
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000002.pth")
    train(config, out, *opts)
    assert_same_run(load(out), whole)
    assert any(k.startswith("fusion.teacher_2.") for k in load(out)["model"])
    lines = (out / "metrics.json").read_text()
    assert '"teacher_2/bbox/AP"' in lines and '"teacher/bbox/AP"' not in lines


def test_so_does_a_run_with_data_loader_workers(folder, whole, tmp_path):
    opts = ("OUTPUT_DIR", tmp_path, "DATALOADER.NUM_WORKERS", 2)
    run(folder / "RCNN.yaml", *opts)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    run(folder / "RCNN.yaml", "--resume", *opts)
    assert_same_run(load(tmp_path), whole("RCNN"))


def test_evaluations_change_nothing_of_the_training(folder, whole, tmp_path):
    train(folder / "RCNN.yaml", tmp_path, "TEST.EVAL_PERIOD", 0)
    assert_same_run(load(tmp_path), whole("RCNN"))


def run_in_child(config, out, opts):
    os.setsid()  # a process group of its own, to be signalled as a whole
    multiprocessing.set_start_method("fork", force=True)  # of data loader workers, as usual
    os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    run(config, "--resume", "OUTPUT_DIR", out, *opts)


def start(config, out, *opts):
    """A run, from its last checkpoint if there is one, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crosskd_ifc", "test_resume"])
    process = context.Process(target=run_in_child, args=(str(config), str(out), opts))
    process.start()
    return process


def train(config, out, *opts):
    """As :func:`start`, to its end."""
    process = start(config, out, *opts)
    process.join()
    assert process.exitcode == 0, open(f"{out}.log").read()[-3000:]


def kill_at_random(config, out, times, seed, *opts):
    """Kill a run that often at random moments, resuming it each time; returns how often it was."""
    moments, kills = random.Random(seed), 0
    began = time.monotonic()
    train(config, out.with_name("timing"), *opts)  # how long a run takes here
    whole_run = time.monotonic() - began
    while True:
        process = start(config, out, *opts)
        process.join(moments.uniform(0.1, 0.9) * whole_run if kills < times else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0, open(f"{out}.log").read()[-3000:]
        return kills


def test_a_run_killed_at_random_moments_ends_as_one_never_interrupted(folder, whole, tmp_path):
    assert kill_at_random(folder / "RCNN.yaml", tmp_path / "run", 2, 1) >= 1
    assert_same_run(load(tmp_path / "run"), whole("RCNN"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_twenty_random_moments_ends_as_one_never_interrupted(
    folder, whole, tmp_path, kind
):
    kills = 0
    for attempt in range(20):
        out = tmp_path / str(attempt)
        workers = ("DATALOADER.NUM_WORKERS", attempt % 3)
        kills += kill_at_random(folder / f"{kind}.yaml", out, 3, attempt, *workers)
        assert_same_run(load(out), whole(kind))
        if kills >= 20:
            return
    raise AssertionError(f"only {kills} kills hit")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(folder, whole, finished):
    out = finished("RCNN")
    last = out / "model_final.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    train(folder / "RCNN.yaml", out)
    log = (out / "log.txt").read_text()
    assert f"Resuming from an earlier checkpoint instead: {out}/model_0000005.pth" in log
    assert "model_final.pth" in log.split("A checkpoint can't be read: ")[1]
    assert_same_run(load(out), whole("RCNN"))


def test_resuming_in_an_empty_folder_names_start_weights_that_are_missing(folder, tmp_path):
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS: there is no file 'none.pth'"):
        run(folder / "RCNN.yaml", "--resume", "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", "none.pth")


def test_a_folder_with_damaged_checkpoints_only_is_refused(folder, tmp_path):
    (tmp_path / "model_0000005.pth").write_bytes(b"PK")
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints in .* can be read"):
        run(folder / "RCNN.yaml", "--resume", "OUTPUT_DIR", tmp_path)
    assert (tmp_path / "model_0000005.pth").read_bytes() == b"PK"


@pytest.mark.parametrize("mode", [(), ("--resume",), ("--resume", "--eval-only")])
@pytest.mark.parametrize("tag", ["model_0000005.pth", ""])
def test_a_tag_that_is_alone_is_to_be_deleted(folder, tmp_path, mode, tag):
    (tmp_path / "last_checkpoint").write_text(tag)
    with pytest.raises(ConfigError, match="has a file last_checkpoint, but no checkpoint: delete"):
        run(folder / "RCNN.yaml", *mode, "OUTPUT_DIR", tmp_path)


def test_a_run_is_not_resumed_with_another_teacher(folder, tmp_path):
    config = folder / "RCNN.yaml"
    run(config, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 3)
    other = torch.load(folder / "RCNN_teacher.pth", weights_only=True)
    other["model"]["roi_heads.box_head.fc1.weight"] += 1
    torch.save(other, tmp_path / "other.pth")
    theirs = ("MODEL.CROSSKD.TEACHER.WEIGHTS", tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="TEACHER: its weights are not those that this run start"):
        run(config, "--resume", "OUTPUT_DIR", tmp_path, *theirs)


@pytest.mark.parametrize(
    "change",
    [
        ("MODEL.PIXEL_STD", [57.0, 57.0, 57.0]),
        ("INPUT.FORMAT", "RGB"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.4, 1.0, 2.0]]),
    ],
    ids=["pixels", "format", "anchors"],
)
def test_nor_with_a_teacher_that_reads_its_images_otherwise(folder, tmp_path, change):
    config = folder / "RCNN.yaml"
    steps = ("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ())
    run(config, *steps)
    otherwise = ("MODEL.CROSSKD.TEACHER.OPTS", change)
    with pytest.raises(ConfigError, match="TEACHER: its INPUT.FORMAT, .* are not those that this"):
        run(config, "--resume", *steps, "SOLVER.MAX_ITER", 2, *otherwise)
    last = load(tmp_path)
    del last["trainer"]["hooks"]["ResumeState"]["teacher_inputs"]  # as of earlier versions
    torch.save(last, tmp_path / "model_final.pth")
    run(config, "--resume", *steps, "SOLVER.MAX_ITER", 2, *otherwise)


def test_a_teacher_file_that_changes_during_a_run_has_no_effect(folder, whole, tmp_path):
    weights = tmp_path / "teacher.pth"
    weights.write_bytes((folder / "RCNN_teacher.pth").read_bytes())
    opts = ("OUTPUT_DIR", tmp_path / "run", "MODEL.CROSSKD.TEACHER.WEIGHTS", weights)
    process = start(folder / "RCNN.yaml", tmp_path / "run", *opts[2:])
    wait_for(tmp_path / "run" / "model_0000002.pth", process)
    weights.write_bytes(b"something else")
    process.join()
    assert_same_run(load(tmp_path / "run"), whole("RCNN"))


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive(), "the run has ended"
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["model_0000002.pth", "inference"])
def test_sigterm_saves_and_ends_and_the_run_goes_on_exactly(folder, whole, tmp_path, moment):
    out = tmp_path / "run"
    opts = ("SOLVER.CHECKPOINT_PERIOD", 3 if moment.startswith("model") else 1000)
    process = start(folder / "RCNN.yaml", out, *opts)
    wait_for(out / moment, process)
    process.terminate()
    process.join()
    log = (out / "log.txt").read_text()
    assert process.exitcode == 128 + signal.SIGTERM, log[-2000:]
    assert "SIGTERM: stopped after iteration" in log and "Traceback" not in log
    assert not (out / "model_final.pth").exists()
    train(folder / "RCNN.yaml", out, *opts)
    assert_same_run(load(out), whole("RCNN"))


@pytest.mark.parametrize("moment", ["model_0000002.pth", "inference"])
def test_so_does_sigterm_to_the_whole_process_group(folder, whole, tmp_path, moment):
    """As `timeout` and SLURM send it: data loader workers get it, too."""
    out, workers = tmp_path / "run", ("DATALOADER.NUM_WORKERS", 2)
    process = start(folder / "RCNN.yaml", out, *workers)
    wait_for(out / moment, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    log = (tmp_path / "run.log").read_text()
    assert process.exitcode == 128 + signal.SIGTERM, log[-2000:]
    assert "SIGTERM: stopped after iteration" in log
    # Python shows what it can't raise, as in the callbacks around a fork.
    assert log.count("Traceback") == log.count("Exception ignored"), log[-2000:]
    train(folder / "RCNN.yaml", out, *workers)
    assert_same_run(load(out), whole("RCNN"))


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(folder, tmp_path):
    """The device is a file size limit: writing beyond it fails as on a full disk."""
    import resource

    out = tmp_path / "run"
    run(folder / "RCNN.yaml", "OUTPUT_DIR", out, "SOLVER.MAX_ITER", 3)
    before = {p.name: p.read_bytes() for p in out.glob("*.pth")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        size = len(before["model_final.pth"]) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(
            CheckpointError, match="0000005.pth can't be written: .*MiB are free.*--resume"
        ):
            run(folder / "RCNN.yaml", "--resume", "OUTPUT_DIR", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {p.name: p.read_bytes() for p in out.glob("*.pth")} == before
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(out.glob(".unfinished*"))


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("can't mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize(
    "room, told",
    [(0, "a disk or a quota is full "), (200, "the checkpoint .*MiB are free there")],
    ids=["none", "none for a checkpoint"],
)
def test_a_disk_without_room_is_one_line(folder, small_disk, room, told):
    out, config = small_disk / "run", folder / "RCNN.yaml"
    train(config, out, "SOLVER.MAX_ITER", 3)
    with contextlib.suppress(OSError), open(small_disk / "filling", "wb", buffering=0) as f:
        while True:
            f.write(bytes(1024))
    os.truncate(small_disk / "filling", os.path.getsize(small_disk / "filling") - room * 1024)
    words = ["--config-file", config, "--resume", "OUTPUT_DIR", out]
    done = subprocess.run(
        [sys.executable, TRAIN_NET, *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1
    # A thread of TensorBoard's has a traceback of its own, at any time.
    ours, _, _ = done.stderr.partition("Exception in thread")
    assert len(re.findall(f"(?m)^error: {told}", done.stderr)) == 1 and "Traceback" not in ours
    assert "Logging error" not in done.stderr
    assert load(out)["iteration"] == 2
