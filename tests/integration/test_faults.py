"""What goes wrong in a training: losses that aren't finite, memory, processes that die."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from test_resume import assert_same_run, folder, load, no_jit, train, whole  # noqa: F401
from test_train_net import TRAIN_NET
from torch.multiprocessing import ProcessRaisedException

from crosskd_ifc import CrossKDTrainer, add_crosskd_ifc_config
from crosskd_ifc.data.shapes import generate
from crosskd_ifc.distillation.teacher import TeacherOutOfMemory
from crosskd_ifc.training.preemption import Terminated


def build_trainer(config, out, *opts, resume=False):
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.merge_from_list(["OUTPUT_DIR", str(out), *opts])
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(cfg.SEED)
    trainer = CrossKDTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


@pytest.fixture
def trainer(folder, tmp_path):  # noqa: F811
    """A Faster R-CNN's, that writes to tmp_path."""
    return build_trainer(folder / "RCNN.yaml", tmp_path / "run")


def at_call(module, number, change):
    """Change what a module gives in its number-th call."""
    calls = []

    def hook(_, inputs, output):
        calls.append(1)
        return change(output) if len(calls) == number else None

    module.register_forward_hook(hook)


def terminate_in_step(trainer, iteration):
    """Train, and ask this process to stop while that step runs."""

    def send(module, *_):
        if module.training and trainer.iter == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.register_forward_hook(send)
    with pytest.raises(Terminated):
        trainer.train()


NO_CHECKPOINTS = ("SOLVER.CHECKPOINT_PERIOD", 1000, "TEST.EVAL_PERIOD", 0)


def test_sigterm_saves_a_finished_run_that_is_extended(folder, tmp_path):  # noqa: F811
    opts = (folder / "RCNN.yaml", tmp_path, *NO_CHECKPOINTS, "DATASETS.TEST", ())
    build_trainer(*opts, "SOLVER.MAX_ITER", 2).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    terminate_in_step(build_trainer(*opts, resume=True), 4)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    assert load(tmp_path, "model_0000004")["iteration"] == 4


def test_sigterm_saves_a_new_run_in_the_folder_of_an_earlier_one(folder, tmp_path):  # noqa: F811
    opts = (folder / "RCNN.yaml", tmp_path, *NO_CHECKPOINTS, "DATASETS.TEST", ())
    terminate_in_step(build_trainer(*opts), 2)
    earlier = load(tmp_path, "model_0000002")["model"]
    terminate_in_step(build_trainer(*opts, "SEED", 6), 2)
    assert any(
        not torch.equal(v, earlier[k]) for k, v in load(tmp_path, "model_0000002")["model"].items()
    )


def test_the_checkpoint_that_is_named_after_a_nan_can_be_read(trainer, tmp_path):
    """Not the last one, where the weights were broken before it."""

    class BreakWeights(HookBase):
        def after_step(self):
            if trainer.iter == 5:
                trainer.model.backbone.fpn_output3.weight.data.fill_(float("nan"))

    trainer._hooks.insert(0, BreakWeights())  # before the one that saves
    with pytest.raises(FloatingPointError, match="last good checkpoint: .*model_0000002.pth"):
        trainer.train()
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000005.pth"
    told = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert told["iteration"] == 6 and "Training has diverged" in told["what"]


def test_a_nan_saves_the_moving_average_of_before_the_step(folder, tmp_path):  # noqa: F811
    trainer = build_trainer(folder / "RetinaNet.yaml", tmp_path / "run")
    seen = []
    trainer.model.head.cls_subnet.register_forward_hook(
        lambda m, i, o: seen.append(getattr(trainer.model, "loss_normalizer", None))
    )
    trainer.model.head.bbox_pred.register_forward_hook(
        lambda m, i, o: o * float("nan") if trainer.iter == 4 else None
    )
    with pytest.raises(FloatingPointError):
        trainer.train()
    state = load(tmp_path / "run", "model_0000003")["trainer"]["hooks"]["ResumeState"]
    assert state["loss_normalizer"] == float(seen[-1])


def test_sigterm_in_the_last_step_skips_the_final_evaluation(folder, tmp_path):  # noqa: F811
    terminate_in_step(build_trainer(folder / "RCNN.yaml", tmp_path, *NO_CHECKPOINTS), 7)
    assert load(tmp_path)["iteration"] == 7
    assert not (tmp_path / "inference").exists()
    train(folder / "RCNN.yaml", tmp_path, *NO_CHECKPOINTS)  # evaluates
    assert (tmp_path / "inference").exists()


def test_an_error_in_the_last_step_is_not_followed_by_an_evaluation(folder, tmp_path):  # noqa: F811
    def fail(module, *_):
        if module.training:
            raise OSError(errno.ENOSPC, "no space")

    trainer = build_trainer(folder / "RCNN.yaml", tmp_path, "SOLVER.MAX_ITER", 1)
    trainer.model.register_forward_hook(fail)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert not (tmp_path / "inference").exists()


def poison(x):
    return {k: v * float("nan") if k == "p2" else v for k, v in x.items()}


def test_a_nan_in_the_distillation_names_term_iteration_and_images(
    trainer, folder, whole, tmp_path  # noqa: F811
):
    predictor = trainer.model.teacher.model.roi_heads.box_predictor
    # Each step runs it twice: for the teacher and for the cross-head.
    at_call(predictor, 2 * 5 - 1, lambda x: (x[0] * float("nan"), x[1]))
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "not finite at iteration 4: loss_cls_kd, loss_box_reg_kd. Images: " in message
    assert message.count(".jpg") + message.count(".png") == 2
    assert "The teacher's own features of them are finite." in message
    out = tmp_path / "run"
    assert f"The last good checkpoint: {out}/model_0000003.pth" in message
    assert load(out, "model_0000003")["iteration"] == 3
    train(folder / "RCNN.yaml", out)  # goes on from there as if nothing had been
    assert_same_run(load(out), whole("RCNN"))


def test_a_teacher_whose_features_are_not_finite_is_named(trainer):
    trainer.model.teacher.model.backbone.register_forward_hook(lambda m, i, o: poison(o))
    with pytest.raises(FloatingPointError, match="features of them are not finite: p2.*: none"):
        trainer.train()


def test_a_nan_in_a_detection_loss_is_named_and_weights_that_are_not_finite_are_not_saved(
    trainer, tmp_path
):
    def break_weights(module, inputs, output):
        if trainer.iter == 4:
            module.weight.data.fill_(float("nan"))
        return output * float("nan") if trainer.iter == 4 else output

    trainer.model.backbone.fpn_output3.register_forward_hook(break_weights)
    with pytest.raises(FloatingPointError, match="(?s)iteration 4: .*NaN.*model_0000002.pth"):
        trainer.train()
    assert not (tmp_path / "run" / "model_0000003.pth").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_in_the_teacher_says_which_settings_to_lower(trainer, error):
    def fail(*_):
        raise error

    trainer.model.teacher.model.backbone.register_forward_hook(fail)
    expected = "out of memory in the teacher's forward: lower SOLVER.IMS_PER_BATCH.*PRECISION"
    with pytest.raises(TeacherOutOfMemory, match=expected):
        trainer.train()


def test_other_errors_of_the_teacher_stay_what_they_are(trainer):
    def fail(*_):
        raise RuntimeError("something else")

    trainer.model.teacher.model.backbone.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="^something else$"):
        trainer.train()


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(config, out, *arguments):
    command = [sys.executable, TRAIN_NET, "--config-file", str(config)]
    command += [*map(str, arguments), "OUTPUT_DIR", str(out)]
    with open(f"{out}.{len(arguments)}.log", "ab") as log:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)


def machines(config, out, *arguments, second=None):
    """Two processes that are a machine each, on this one; ``second``: another OUTPUT_DIR there."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    shared = ("--num-machines", 2, "--num-gpus", 1, "--dist-url", url, "--timeout", 2)
    outs = (out, second or out)
    return [launch(config, outs[i], "--machine-rank", i, *shared, *arguments) for i in (0, 1)]


needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")


@needs_cpu
@pytest.mark.slow
def test_two_machines_train_save_once_resume_and_evaluate(folder, tmp_path):  # noqa: F811
    out, config = tmp_path / "run", folder / "RCNN.yaml"
    steps = ("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 4)
    assert [p.wait() for p in machines(config, out, *steps, "SOLVER.MAX_ITER", 2)] == [0, 0]
    assert {p.name for p in out.glob("*.pth")} == {"model_0000001.pth", "model_final.pth"}
    again = machines(config, out, "--resume", *steps, "SOLVER.MAX_ITER", 4)
    assert [p.wait() for p in again] == [0, 0]
    state = load(out)["trainer"]["hooks"]["ResumeState"]
    assert load(out)["iteration"] == 3 and len(state["random"]) == 2
    assert state["num_batches"] == 4 and state["stream"]["world_size"] == 2
    assert (out / "inference" / "coco_instances_results.json").exists()
    evaluated = machines(config, out, "--eval-only", "MODEL.WEIGHTS", out / "model_final.pth")
    assert [p.wait() for p in evaluated] == [0, 0]


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("known_to", [0, 1])
def test_machines_with_folders_of_their_own_are_refused_when_they_resume(
    folder, tmp_path, known_to  # noqa: F811
):
    outs = tmp_path / "first", tmp_path / "second"
    train(folder / "RCNN.yaml", outs[known_to])
    both = machines(folder / "RCNN.yaml", outs[0], "--resume", second=outs[1])
    assert [p.wait(timeout=150) == 0 for p in both] == [False, False]
    for log in tmp_path.glob("*.*.log"):
        assert "must be one folder, which all machines share" in log.read_text().splitlines()[-1]


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.05)


LONG = ("SOLVER.MAX_ITER", 100000, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 0)


@needs_cpu
@pytest.mark.slow
def test_a_machine_that_dies_makes_the_other_stop_with_an_error(folder, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    both = machines(folder / "RCNN.yaml", out, *LONG)
    try:
        until(lambda: (out / "model_0000002.pth").exists())
        both[1].kill()
        assert both[0].wait(timeout=150) not in (0, None)
    finally:
        for process in both:
            process.kill()


@needs_cpu
@pytest.mark.slow
def test_sigterm_stops_two_processes_together_and_they_go_on(folder, tmp_path):  # noqa: F811
    out, config = tmp_path / "run", folder / "RCNN.yaml"
    process = launch(config, out, "--num-gpus", 2, *LONG)
    until(lambda: (out / "model_0000002.pth").exists())
    process.terminate()
    assert process.wait(timeout=120) == 143
    name = (out / "last_checkpoint").read_text()
    done = load(out, name[:-4])["iteration"] + 1
    assert (
        done % 10 == 0
        and len(load(out, name[:-4])["trainer"]["hooks"]["ResumeState"]["random"]) == 2
    )
    more = ("SOLVER.MAX_ITER", done + 2, "SOLVER.STEPS", (), "TEST.EVAL_PERIOD", 0)
    assert launch(config, out, "--resume", "--num-gpus", 2, *more).wait() == 0
    assert load(out)["iteration"] == done + 1


def has_handler(process):
    with open(f"/proc/{process.pid}/status") as f:
        caught = next(line.split()[1] for line in f if line.startswith("SigCgt"))
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def has_children(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        return len(f.read().split()) > 1  # the first one tracks resources


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["setup", "start", "evaluation", "final evaluation"])
def test_sigterm_stops_two_processes_at_any_moment(folder, tmp_path, moment):  # noqa: F811
    out, config = tmp_path / "run", folder / "RCNN.yaml"
    generate(str(tmp_path / "data"), num_images={"test": 400}, image_size=64, seed=3)
    card = yaml.safe_load((folder / "card.yaml").read_text())
    test = {"test": {"json": "annotations/test.json", "images": "test"}}
    card |= {"name": "manyshapes", "root": str(tmp_path / "data"), "splits": test}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    opts = ("--num-gpus", 2, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 1000)
    opts += ("DATASETS.CARDS", (str(folder / "card.yaml"), str(tmp_path / "card.yaml")))
    evaluated = ("DATASETS.TEST", ("manyshapes_test",), "TEST.EVAL_PERIOD", 4)
    last = 4 if moment == "final evaluation" else 6
    process = launch(config, out, *opts, *evaluated, "SOLVER.MAX_ITER", last)
    conditions = {"setup": lambda: has_handler(process), "start": lambda: has_children(process)}
    log = out / "log.txt"
    in_evaluation = lambda: log.exists() and "Start inference" in log.read_text()  # noqa: E731
    until(conditions.get(moment, in_evaluation))
    process.terminate()
    assert process.wait(timeout=60) == 143
    if "evaluation" in moment:
        name = "model_final" if moment.startswith("final") else "model_0000003"
        state = load(out, name)["trainer"]["hooks"]["ResumeState"]
        assert load(out, name)["iteration"] == 3 and None not in state["random"]
        more = ("DATASETS.TEST", (), "SOLVER.MAX_ITER", 6)
        assert launch(config, out, "--resume", *opts, *more).wait() == 0
        assert load(out)["iteration"] == 5


def train_with_nan_in_the_second(config, out):
    """One of two processes, on which the distillation fails in the third step."""
    torch.set_num_threads(1)
    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.merge_from_file(config)
    cfg.merge_from_list(["OUTPUT_DIR", out, "SOLVER.CHECKPOINT_PERIOD", 1])
    trainer = CrossKDTrainer(cfg)
    if comm.get_rank() == 1:
        predictor = trainer.model.module.teacher.model.roi_heads.box_predictor
        at_call(predictor, 5, lambda x: (x[0] * float("nan"), x[1]))
    trainer.train()


@needs_cpu
@pytest.mark.slow
def test_a_nan_in_one_of_two_processes_stops_both(folder, tmp_path):  # noqa: F811
    """The first process, which collects the losses, says so; nobody waits for the other."""
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(ProcessRaisedException, match="a loss of another process is not finite"):
        detectron2_launch(
            train_with_nan_in_the_second,
            2,
            dist_url="auto",
            args=(str(folder / "RCNN.yaml"), str(out)),
        )
    assert load(out, "model_0000001")["iteration"] == 1
    assert not (out / "model_0000002.pth").exists()
