"""tools/train_net.py from end to end, on a handful of pictures of the built-in kind."""

import copy
import glob
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor, default_argument_parser
from detectron2.modeling import GeneralizedRCNN, build_model
from helpers import load_tool, tiny_cfg, tiny_model
from test_cards import Voc

from crosskd_ifc import ConfigError, CrossKDRCNN, CrossKDTrainer
from crosskd_ifc.analysis.curves import read_metrics
from crosskd_ifc.analysis.detector import load_detector
from crosskd_ifc.analysis.run_record import RunRecord
from crosskd_ifc.config import remove_crosskd_ifc_config
from crosskd_ifc.data.shapes import CLASSES, generate
from crosskd_ifc.training.checkpointer import CheckpointError
from crosskd_ifc.weights.export import export_student

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
TRAIN_NET = os.path.join(ROOT, "tools", "train_net.py")
CLASS_COUNT = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES))
SCHEDULE = "MODEL.CROSSKD.SCHEDULE."
# What training from scratch needs.
TRAINABLE = (
    *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("SOLVER.CLIP_GRADIENTS.ENABLED", True, *CLASS_COUNT),
)


train_net = load_tool("train_net")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a data set, its card, and a teacher's config and weights."""
    folder = tmp_path_factory.mktemp("train_net")
    generate(str(folder / "data"), num_images={"train": 6, "test": 4}, image_size=64, seed=3)
    card = {
        "name": "fewshapes",
        "format": "coco",
        "root": "data",
        "splits": {s: {"json": f"annotations/{s}.json", "images": s} for s in ("train", "test")},
        "classes": list(CLASSES),
        "evaluator": "coco",
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    cfg = tiny_cfg(*TRAINABLE, architecture="GeneralizedRCNN")
    (folder / "teacher.yaml").write_text(cfg.dump())
    DetectionCheckpointer(tiny_model(cfg, seed=7), str(folder)).save("teacher")
    return folder


def write_config(files, folder, *opts):
    """A student's config file that distils from the teacher, 4 steps."""
    settings = {
        "MODEL.CROSSKD.TEACHER.CONFIG_FILE": str(files / "teacher.yaml"),
        "MODEL.CROSSKD.TEACHER.WEIGHTS": str(files / "teacher.pth"),
        "MODEL.CROSSKD.FUSION.NAME": "mean",  # with adapters, which learn
        "MODEL.CROSSKD.FUSION.IN_FEATURES": ("pool", "fc1", "fc2"),
        "DATASETS.CARDS": (str(files / "card.yaml"),),
        "DATASETS.TRAIN": ("fewshapes_train",),
        "DATASETS.TEST": ("fewshapes_test",),
        "SOLVER.MAX_ITER": 4,
        "SOLVER.STEPS": (3,),
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 4,
        "OUTPUT_DIR": str(folder / "run"),
        "SEED": 5,
    }
    cfg = tiny_cfg(*TRAINABLE, *(x for pair in settings.items() for x in pair), *opts)
    path = folder / "student.yaml"
    path.write_text(cfg.dump())
    return str(path), folder / "run"


def run(config, *arguments):
    return train_net.main(
        default_argument_parser().parse_args(["--config-file", config, *map(str, arguments)])
    )


def metrics(folder):
    with open(folder / "metrics.json") as f:
        return [json.loads(line) for line in f]


def test_a_distilled_run_trains_resumes_evaluates_and_deploys(files, tmp_path):
    config, out = write_config(files, tmp_path)
    run(config, "SOLVER.MAX_ITER", 2)
    first = torch.load(out / "model_final.pth", weights_only=False)
    assert first["iteration"] == 1

    run(config, "--resume")
    last = torch.load(out / "model_final.pth", weights_only=False)
    state = last["trainer"]
    assert last["iteration"] == 3 and state["hooks"]["LRScheduler"]["last_epoch"] == 4
    assert all(x["momentum_buffer"].any() for x in _momenta(state))
    lines = metrics(out)
    steps = [line["iteration"] for line in lines if "total_loss" in line]
    assert steps[0] == 1 and steps[-1] >= 3
    assert {"loss_cls_kd", "loss_box_reg_kd"} <= {key for line in lines for key in line}

    # Keys: the student's own, and adapters; all of them fit stock detectron2.
    model = build_model(tiny_cfg(*TRAINABLE, architecture="GeneralizedRCNN"))
    missing, unexpected = model.load_state_dict(last["model"], strict=False)
    assert not missing and unexpected and all(k.startswith("fusion.") for k in unexpected)

    # Evaluation gives training's last AP, and needs no teacher.
    gone = ("MODEL.CROSSKD.TEACHER.WEIGHTS", "gone.pth", "MODEL.CROSSKD.TEACHER.CONFIG_FILE", "x")
    weights = ("MODEL.WEIGHTS", out / "model_final.pth")
    results = run(config, "--eval-only", *weights, *gone, "OUTPUT_DIR", tmp_path / "eval")
    assert results["bbox"]["AP"] == pytest.approx(lines[-1]["bbox/AP"], nan_ok=True)
    detections = "inference/coco_instances_results.json"
    assert (out / detections).read_text() == (tmp_path / "eval" / detections).read_text() != "[]"

    # The student alone, in stock detectron2.
    exported = export_student(str(out / "model_final.pth"), str(tmp_path / "deployed"))
    stock = get_cfg()
    stock.merge_from_file(exported.config)
    assert type(DefaultPredictor(stock).model).__name__ == "GeneralizedRCNN"

    # So does DefaultPredictor, on the config that the run wrote.
    cfg = tiny_cfg()
    cfg.merge_from_file(str(out / "config.yaml"))
    cfg.merge_from_list([*map(str, weights), *gone])
    image = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8).numpy()
    assert "instances" in DefaultPredictor(cfg)(image)


def _momenta(state):
    return state["_trainer"]["optimizer"]["state"].values()


def test_the_teacher_is_evaluated_before_the_first_step_and_statistics_are_logged(files, tmp_path):
    config, out = write_config(
        files, tmp_path, "MODEL.CROSSKD.TEACHER.EVAL_AT_START", True, "SOLVER.MAX_ITER", 20
    )
    run(config, "TEST.EVAL_PERIOD", 0)
    lines = metrics(out)
    logged = {k: v for line in lines for k, v in line.items()}
    assert "teacher/bbox/AP" in logged and "bbox/AP" in logged
    assert {"crosskd/teacher_confidence", "crosskd/agreement_cross_head"} <= set(logged)
    assert logged["crosskd/factor"] == 1 and logged["crosskd/num_rois"] > 0
    assert list(out.glob("events.out.tfevents*"))


def test_evaluating_the_teacher_first_changes_nothing_of_the_training(files, tmp_path):
    states = []
    for evaluate in (False, True):
        folder = tmp_path / str(evaluate)
        folder.mkdir()
        config, out = write_config(files, folder, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
        run(config, "MODEL.CROSSKD.TEACHER.EVAL_AT_START", evaluate)
        states.append(torch.load(out / "model_final.pth", weights_only=True)["model"])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_run_whose_teacher_the_voc_evaluator_has_scored_is_resumed(tmp_path):
    voc = Voc(tmp_path, evaluator="pascal_voc", year=2012)
    two = ("MODEL.ROI_HEADS.NUM_CLASSES", 2)
    cfg = tiny_cfg(*TRAINABLE, *two, architecture="GeneralizedRCNN")
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    DetectionCheckpointer(tiny_model(cfg, seed=7), str(tmp_path)).save("teacher")
    data = ("DATASETS.CARDS", (str(voc.card),), "DATASETS.TRAIN", ("tiny_train",))
    data += ("DATASETS.TEST", ("tiny_val",), "TEST.EVAL_PERIOD", 0, "SOLVER.STEPS", ())
    config, out = write_config(tmp_path, tmp_path, *two, *data)
    run(config, "SOLVER.MAX_ITER", 1)
    for steps in (2, 3):  # switched on later, it is evaluated once
        asked = ("SOLVER.MAX_ITER", steps, "MODEL.CROSSKD.TEACHER.EVAL_AT_START", True)
        run(config, "--resume", *asked)
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 2
    assert [x["iteration"] for x in metrics(out) if "teacher/bbox/AP" in x] == [1]


def test_a_teacher_with_masks_is_evaluated_on_boxes_where_the_student_has_only_boxes(
    files, tmp_path
):
    card = yaml.safe_load((files / "card.yaml").read_text())
    for split in ("train", "test"):
        path = files / "data" / "annotations" / f"{split}.json"
        coco = json.loads(path.read_text())
        for annotation in coco["annotations"]:
            del annotation["segmentation"]
        path.with_name(f"boxes_{split}.json").write_text(json.dumps(coco))
        card["splits"][split]["json"] = f"annotations/boxes_{split}.json"
    card["name"] = "boxesonly"
    (files / "boxes.yaml").write_text(yaml.safe_dump(card))
    masks = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    cfg = tiny_cfg(*TRAINABLE, *masks, architecture="GeneralizedRCNN")
    (tmp_path / "masks.yaml").write_text(cfg.dump())
    DetectionCheckpointer(tiny_model(cfg, seed=7), str(tmp_path)).save("masks")
    teacher = {"CONFIG_FILE": "masks.yaml", "WEIGHTS": "masks.pth", "EVAL_AT_START": True}
    opts = {f"MODEL.CROSSKD.TEACHER.{k}": v for k, v in teacher.items()}
    opts = {k: str(tmp_path / v) if isinstance(v, str) else v for k, v in opts.items()}
    opts["DATASETS.CARDS"] = (str(files / "boxes.yaml"),)
    opts["DATASETS.TRAIN"], opts["DATASETS.TEST"] = ("boxesonly_train",), ("boxesonly_test",)
    config, out = write_config(files, tmp_path, *(x for pair in opts.items() for x in pair))
    run(config, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0)
    logged = {key for line in metrics(out) for key in line}
    assert "teacher/bbox/AP" in logged and "teacher/segm/AP" not in logged


NO_EVALUATION = ("TEST.EVAL_PERIOD", 0, "DATASETS.TEST", ())


def test_a_resumed_run_goes_on_with_its_own_optimizer_settings(files, tmp_path):
    warm = ("SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.5, "SOLVER.STEPS", ())
    config, out = write_config(files, tmp_path, *warm, *NO_EVALUATION)
    run(config, "SOLVER.MAX_ITER", 2)
    new = ("SOLVER.BASE_LR", 0.1, "SOLVER.MOMENTUM", 0.3, "SOLVER.WEIGHT_DECAY", 0.2)
    run(config, "--resume", "SOLVER.MAX_ITER", 3, *new)
    last = torch.load(out / "model_final.pth", weights_only=True)
    groups = last["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {x["momentum"] for x in groups} == {0.3}
    # Norms and the fusion have decays of their own.
    assert [x["weight_decay"] for x in groups] == [0.2, 0.0, 0.0]
    assert re.search(r"optimizer.momentum +0.9 +0.3\n", (out / "log.txt").read_text())
    del last["trainer"]["optimizer_settings"]  # as in checkpoints of earlier versions
    torch.save(last, out / "model_final.pth")
    run(config, "--resume", *new, "SOLVER.BASE_LR", 0.2)
    rates = {x["iteration"]: x["lr"] for x in metrics(out)}
    assert rates[2] == pytest.approx(0.1 * (0.5 + 0.5 * 2 / 3))
    assert rates[3] == pytest.approx(0.2 * (0.5 + 0.5 * 3 / 4))


def test_the_schedule_is_followed_in_training(files, tmp_path):
    start = (SCHEDULE + "START_ITER", 20, "SOLVER.MAX_ITER", 40)
    config, out = write_config(files, tmp_path, *start)
    run(config, "TEST.EVAL_PERIOD", 0)
    values = {line["iteration"]: line for line in metrics(out) if "loss_cls_kd" in line}
    assert values[19]["loss_cls_kd"] == 0 and values[19]["crosskd/factor"] == 0
    assert values[39]["loss_cls_kd"] > 0 and values[39]["crosskd/factor"] == 1


@pytest.mark.parametrize(
    "opts, factors",
    [
        (
            (SCHEDULE + "WARMUP_ITERS", 40, SCHEDULE + "STOP_ITER", 30, "SOLVER.MAX_ITER", 40),
            {19: 0.5, 39: 0.0},
        ),
        (
            (SCHEDULE + "START_ITER", 10, "SOLVER.MAX_ITER", 20, "SOLVER.REFERENCE_WORLD_SIZE", 2),
            {19: 0.0, 39: 1.0},
        ),
    ],
    ids=["warm-up and stop", "scaled to the processes"],
)
def test_the_factor_is_that_of_the_schedule(opts, factors, files, tmp_path):
    config, out = write_config(files, tmp_path, *opts)
    run(config, "TEST.EVAL_PERIOD", 0)
    lines = [line for line in metrics(out) if "crosskd/factor" in line]
    assert {line["iteration"]: line["crosskd/factor"] for line in lines} == factors


def test_a_run_inherits_at_its_start_and_not_when_it_is_resumed(files, tmp_path):
    inherit = ("MODEL.CROSSKD.INHERIT", ("roi_heads.box_head", "backbone.fpn"))
    config, out = write_config(files, tmp_path, *inherit)
    run(config, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.0)
    first = torch.load(out / "model_final.pth", weights_only=True)["model"]
    theirs = torch.load(files / "teacher.pth", weights_only=True)["model"]
    for name in ("roi_heads.box_head.fc1.weight", "backbone.fpn_lateral3.weight"):
        assert torch.equal(first[name], theirs[name])
    name = "backbone.bottom_up.stem.conv1.weight"
    assert not torch.equal(first[name], theirs[name])
    checkpoint = torch.load(out / "model_final.pth", weights_only=True)
    checkpoint["model"]["roi_heads.box_head.fc1.weight"] += 1  # what was learned since
    torch.save(checkpoint, out / "model_final.pth")
    run(config, "--resume", "SOLVER.MAX_ITER", 2)
    last = torch.load(out / "model_final.pth", weights_only=True)["model"]
    name = "roi_heads.box_head.fc1.weight"
    torch.testing.assert_close(last[name], first[name] + 1, rtol=0, atol=0.1)
    log = (out / "log.txt").read_text()
    assert log.count("INHERIT roi_heads.box_head: 4 of 4 tensors start from the teacher's") == 1


def test_a_plain_config_trains_with_the_same_script(files, tmp_path):
    config, out = write_config(files, tmp_path)
    stock = (
        "MODEL.META_ARCHITECTURE",
        "GeneralizedRCNN",
        "MODEL.ROI_HEADS.NAME",
        "StandardROIHeads",
    )
    run(config, *stock, "MODEL.CROSSKD.TEACHER.CONFIG_FILE", "", "SOLVER.MAX_ITER", 1)
    assert not any("kd" in key for key in metrics(out)[-1])


def test_code_of_ones_own_that_would_train_undistilled_is_refused(files, tmp_path, monkeypatch):
    config, _ = write_config(files, tmp_path)
    with monkeypatch.context() as context:
        context.setattr(CrossKDRCNN, "forward", GeneralizedRCNN.forward)
        with pytest.raises(ConfigError, match="CrossKDRCNN.forward adds no distillation loss"):
            run(config, "OUTPUT_DIR", tmp_path / "a")
    plain = classmethod(lambda cls, cfg: build_model(cfg))
    monkeypatch.setattr(CrossKDTrainer, "build_model", plain)
    with pytest.raises(ConfigError, match="CrossKDTrainer.build_model attaches no teacher"):
        run(config, "OUTPUT_DIR", tmp_path / "b")

    class MeanTeacher(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.teacher = model, torch.nn.Identity()
            self.device = model.device

    wrapped = classmethod(lambda cls, cfg: MeanTeacher(build_model(cfg)))
    monkeypatch.setattr(CrossKDTrainer, "build_model", wrapped)
    with pytest.raises(ConfigError, match="CrossKDTrainer.build_model attaches no teacher"):
        run(config, "OUTPUT_DIR", tmp_path / "c")


def test_a_student_inside_of_another_module_is_refused(files, tmp_path, monkeypatch):
    config, _ = write_config(files, tmp_path)
    stock = CrossKDTrainer.build_model.__func__
    wrapped = classmethod(lambda cls, cfg: torch.nn.Sequential(stock(cls, cfg)))
    monkeypatch.setattr(CrossKDTrainer, "build_model", wrapped)
    with pytest.raises(ConfigError, match="puts the student into a Sequential"):
        run(config)


def test_expected_results_are_honoured(files, tmp_path):
    config, out = write_config(files, tmp_path, "SOLVER.MAX_ITER", 1)
    expect = "TEST.EXPECTED_RESULTS", "[['bbox','AP',99.0,0.1]]"
    with pytest.raises(SystemExit):
        run(config, *expect)
    with pytest.raises(SystemExit):
        run(config, "--eval-only", "MODEL.WEIGHTS", out / "model_final.pth", *expect)


def run_script(*command):
    """A command in a process of its own, with one thread and no GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def by_two_processes(files, tmp_path_factory):
    """OUTPUT_DIR of a run that detectron2's launcher has started two processes for."""
    config, out = write_config(files, tmp_path_factory.mktemp("launched"))
    done = run_script(TRAIN_NET, "--num-gpus", 2, "--config-file", config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_two_processes_on_the_cpu_train_and_evaluate_together(by_two_processes):
    assert any("bbox/AP" in line for line in metrics(by_two_processes))
    model = torch.load(by_two_processes / "model_final.pth", weights_only=False)["model"]
    assert not any(k.startswith("module.") for k in model)


def test_torchrun_starts_two_processes_that_train_together(files, by_two_processes, tmp_path):
    config, out = write_config(files, tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*torchrun, TRAIN_NET, "--config-file", config]
    done = run_script(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = (out / "log.txt").read_text()
    assert "Rank of current process: 0. World size: 2" in log
    assert (out / "log.txt.rank1").exists()
    assert any("bbox/AP" in line for line in metrics(out))
    # The same as detectron2's launcher gives.
    weights = torch.load(out / "model_final.pth", weights_only=False)["model"]
    launched = torch.load(by_two_processes / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(value, launched[name]) for name, value in weights.items())

    done = run_script(*command, "--num-gpus", 2)
    assert done.returncode != 0 and "error: --num-gpus" in done.stderr


@pytest.mark.parametrize(
    "processes, opts, message",
    [
        ("1", ("MODEL.CROSSKD.FUSION.NAME", "blend"), "MODEL.CROSSKD.FUSION.NAME is 'blend'"),
        ("1", ("MODEL.CROSSKD.NAME", "x"), "command line: Non-existent key: MODEL.CROSSKD.NAME"),
        # Before any process is started.
        ("2", ("SOLVER.MAX_ITER", "many"), "command line: Type mismatch .* SOLVER.MAX_ITER"),
        ("1", ("--num-machines", "2"), "--num-machines: give --dist-url"),
    ],
    ids=["value", "key", "type", "machines"],
)
def test_a_wrong_setting_ends_the_script_with_one_line(
    files, tmp_path, monkeypatch, processes, opts, message
):
    config, _ = write_config(files, tmp_path)
    words = ["train_net", "--config-file", config, "--num-gpus", processes, *opts]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        train_net.invoke_main()


def test_what_shows_only_in_each_process_ends_the_script_with_one_line_too(files, tmp_path):
    config, _ = write_config(files, tmp_path)
    opts = ("MODEL.CROSSKD.FUSION.ENTRY", "fc9")
    done = run_script(TRAIN_NET, "--config-file", config, "--num-gpus", 2, *opts)
    assert done.returncode == 1
    message = "^error: MODEL.CROSSKD.FUSION.ENTRY: .* 'fc9'"
    assert re.search(message, done.stderr, re.MULTILINE), done.stderr[-2000:]
    assert "Traceback" not in done.stderr.split("error: ")[-1]


def test_weights_that_are_not_finite_end_the_script_with_one_line(files, tmp_path, monkeypatch):
    weights = torch.load(files / "teacher.pth", weights_only=False)
    weights["model"]["roi_heads.box_predictor.cls_score.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "broken.pth")
    config, _ = write_config(files, tmp_path)
    words = ["train_net", "--config-file", config, "--eval-only", "MODEL.WEIGHTS"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "broken.pth")])
    with pytest.raises(SystemExit, match="^error: .*broken.pth: 1 of its tensors hold NaN"):
        train_net.invoke_main()


@pytest.fixture
def card_with_faults(files, tmp_path):
    """Path of a card whose splits have each a fault that once showed after the training."""
    with open(files / "data" / "annotations" / "test.json") as f:
        content = json.load(f)
    contents = {split: copy.deepcopy(content) for split in ("unmarked", "swapped", "twice")}
    del contents["unmarked"]["annotations"][2]["iscrowd"]
    one, two = contents["swapped"]["categories"][:2]
    one["name"], two["name"] = two["name"], one["name"]
    contents["twice"]["categories"].append(contents["twice"]["categories"][0])
    splits = {}
    for split, changed in contents.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(changed))
        splits[split] = {"json": str(tmp_path / f"{split}.json"), "images": "test"}
    card = {"name": "faulty", "format": "coco", "root": str(files / "data"), "splits": splits}
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump(card))
    return str(tmp_path / "faulty.yaml")


FAULTS = {
    "unmarked": r"faulty.yaml: splits.unmarked: .*unmarked.json: annotation \d+: 'iscrowd' is miss",
    "swapped": "'faulty_swapped' has other classes than 'fewshapes_train'.*: class 0 is ",
    "twice": "splits.twice: .*twice.json: 2 categories have the id 1",
}


@pytest.mark.parametrize("mode", [(), ("--eval-only", "MODEL.WEIGHTS", "")])
@pytest.mark.parametrize("split", FAULTS)
def test_a_faulty_test_set_ends_the_script_with_one_line_before_training_and_evaluation(
    files, card_with_faults, tmp_path, monkeypatch, split, mode
):
    config, out = write_config(files, tmp_path)
    cards = str((str(files / "card.yaml"), card_with_faults))
    opts = ("DATASETS.CARDS", cards, "DATASETS.TEST", f"('fewshapes_test', 'faulty_{split}')")
    monkeypatch.setattr(sys, "argv", ["train_net", "--config-file", config, *mode, *opts])
    with pytest.raises(SystemExit, match=f"^error: DATASETS.TEST: .*{FAULTS[split]}"):
        train_net.invoke_main()
    assert not glob.glob(str(out / "**" / "*.pth"), recursive=True)
    assert not (out / "metrics.json").exists() or not metrics(out)


def test_faulty_training_data_end_the_script_with_one_line(
    files, card_with_faults, tmp_path, monkeypatch
):
    config, _ = write_config(files, tmp_path)
    cards = str((str(files / "card.yaml"), card_with_faults))
    opts = ("DATASETS.CARDS", cards, "DATASETS.TRAIN", "('faulty_twice',)")
    monkeypatch.setattr(sys, "argv", ["train_net", "--config-file", config, *opts])
    with pytest.raises(SystemExit, match="^error: dataset card .*" + FAULTS["twice"]):
        train_net.invoke_main()


@pytest.mark.parametrize("lowered", [False, True], ids=["at the end", "beyond it"])
def test_a_run_that_died_before_its_final_checkpoint_gets_it_when_it_is_resumed(
    files, tmp_path, lowered
):
    config, out = write_config(files, tmp_path)
    run(config)
    final = torch.load(out / "model_final.pth", weights_only=True)
    trained = (out / "config.yaml").read_text()
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000003.pth")
    shutil.rmtree(out / "inference")
    lines = (out / "metrics.json").read_text()
    (out / "metrics.json").write_text(lines[:-20])  # by a full disk
    run(config, "--resume", *(("SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (2,)) if lowered else ()))
    assert "bbox/AP" in read_metrics(str(out / "metrics.json"))[-1]
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    again = torch.load(out / "model_final.pth", weights_only=True)
    assert again["iteration"] == 3 and (out / "inference").exists()
    assert all(torch.equal(v, again["model"][k]) for k, v in final["model"].items())
    assert "There is nothing left to train" in (out / "log.txt").read_text()
    assert (out / "config.yaml").read_text() == trained


def test_neither_an_evaluation_nor_a_refused_run_changes_the_trainings_config(files, tmp_path):
    config, out = write_config(files, tmp_path, "SOLVER.MAX_ITER", 1)
    run(config)
    trained = (out / "config.yaml").read_text()
    weights = ("MODEL.WEIGHTS", out / "model_final.pth")
    run(config, "--eval-only", *weights, "INPUT.MIN_SIZE_TEST", 90)
    told = "trained with other values of "
    assert told not in (out / "log.txt").read_text()
    run(config, "--eval-only", *weights, "INPUT.FORMAT", "RGB")
    run(config, "--eval-only", "--resume", "MODEL.PIXEL_STD", [60.0, 60.0, 60.0])
    log = (out / "log.txt").read_text()
    assert f"{told}INPUT.FORMAT than this" in log and f"{told}MODEL.PIXEL_STD than this" in log
    depth = ("MODEL.RESNETS.DEPTH", 101, "SOLVER.MAX_ITER", 2)
    with pytest.raises(CheckpointError, match="(?s)its weights don't fit.*RESNETS.DEPTH +50 +101"):
        run(config, "--resume", *depth)
    with pytest.raises(CheckpointError, match="(?s)missing: fusion.*FUSION.NAME +'mean' +'concat'"):
        run(config, "--resume", "MODEL.CROSSKD.FUSION.NAME", "concat", "SOLVER.MAX_ITER", 2)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run; add --resume"):
        run(config, "SEED", 8)
    assert (out / "config.yaml").read_text() == trained
    exported = export_student(str(out / "model_final.pth"), str(tmp_path / "student"))
    assert yaml.safe_load(open(exported.config))["INPUT"]["MIN_SIZE_TEST"] == 64
    run(config, "--resume", "SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.002)
    assert yaml.safe_load((out / "config.yaml").read_text())["SOLVER"]["BASE_LR"] == 0.002
    log = (out / "log.txt").read_text()
    assert re.search("(?s)goes on with other settings:.*SOLVER.BASE_LR +0.001 +0.002", log)


def test_weights_whose_classes_have_changed_places_are_refused(files, tmp_path):
    config, out = write_config(files, tmp_path, "SOLVER.MAX_ITER", 1)
    run(config)
    file = out / "model_final.pth"
    content = torch.load(file, weights_only=True)
    assert content["config"]["classes"] == list(CLASSES)
    content["config"]["classes"][1:3] = CLASSES[2], CLASSES[1]  # as if the data had changed since
    torch.save(content, file)
    weights = ("MODEL.WEIGHTS", file)
    teacher = (
        *("MODEL.CROSSKD.TEACHER.CONFIG_FILE", out / "config.yaml"),
        *("MODEL.CROSSKD.TEACHER.WEIGHTS", file, "OUTPUT_DIR", tmp_path / "other"),
    )
    uses = {
        "evaluation": lambda: run(config, "--eval-only", *weights),
        "resumed": lambda: run(config, "--resume", "SOLVER.MAX_ITER", 2),
        "teacher": lambda: run(config, *teacher),
    }
    told = f"class '{CLASSES[2]}' had the index 1 in the training of these weights and has 2 in"
    for use in uses.values():
        with pytest.raises(ConfigError, match=told):
            use()
    # Which need no data set.
    assert load_detector(str(out)).class_names == content["config"]["classes"]
    export_student(str(file), str(tmp_path / "out"))
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert about["classes"] == content["config"]["classes"]


def test_a_run_begun_again_without_a_checkpoint_keeps_its_first_log_apart(files, tmp_path):
    config, out = write_config(files, tmp_path, "SOLVER.MAX_ITER", 1)
    out.mkdir()
    (out / "metrics.json").write_text(json.dumps({"iteration": 0, "teacher/bbox/AP": 40.0}) + "\n")
    (out / "wandb_id").write_text("first")
    run(config)
    assert not (out / "wandb_id").exists()
    assert not any("teacher/bbox/AP" in line for line in metrics(out))
    assert "40.0" in (out / "metrics.json.old1").read_text()
    run(config, "--resume", "SOLVER.MAX_ITER", 2)
    assert not (out / "metrics.json.old2").exists()


def test_the_run_writes_the_schedule_that_is_scaled_to_its_processes(files, tmp_path):
    config, out = write_config(files, tmp_path, "SOLVER.MAX_ITER", 1)
    run(config, "SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 2)
    solver = yaml.safe_load((out / "config.yaml").read_text())["SOLVER"]
    assert (solver["MAX_ITER"], solver["IMS_PER_BATCH"]) == (2, 1)
    assert metrics(out)[-1]["iteration"] == 2 and RunRecord(str(out)).iterations == 2
    # Run once more, it stays as it is.
    run(str(out / "config.yaml"), "OUTPUT_DIR", tmp_path / "again")
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["SOLVER"]
    assert again == solver


def test_an_evaluation_without_weights_that_fit_is_refused(files, tmp_path):
    config, out = write_config(files, tmp_path)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty: .*random weights"):
        run(config, "--eval-only")
    for weights in ((), ("MODEL.WEIGHTS", files / "teacher.pth")):
        with pytest.raises(
            ConfigError, match="--resume: OUTPUT_DIR .*run holds no checkpoint to e"
        ):
            run(config, "--eval-only", "--resume", *weights)
    teacher = torch.load(files / "teacher.pth", weights_only=False)
    backbone = {k: v for k, v in teacher["model"].items() if k.startswith("backbone")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(ConfigError, match="WEIGHTS '.*backbone.pth' does not fit .*missing: "):
        run(config, "--eval-only", "MODEL.WEIGHTS", tmp_path / "backbone.pth")
    other = ("MODEL.WEIGHTS", files / "teacher.pth", "MODEL.RESNETS.DEPTH", 101)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS '.*teacher.pth' does not fit"):
        run(config, "--eval-only", *other)


def test_missing_weights_are_one_error_naming_the_key(files, tmp_path):
    config, _ = write_config(files, tmp_path)
    for mode in ((), ("--eval-only",)):
        with pytest.raises(ConfigError, match="MODEL.WEIGHTS: there is no file 'gone.pth'"):
            run(config, *mode, "MODEL.WEIGHTS", "gone.pth")


def test_a_missing_config_file_lists_what_was_tried():
    with pytest.raises(ConfigError, match="(?s)--config-file.*Tried.*configs"):
        run("no/such.yaml")


def test_the_run_writes_a_config_that_stock_detectron2_reads_but_for_our_keys(files, tmp_path):
    config, out = write_config(files, tmp_path, "SOLVER.MAX_ITER", 1)
    run(config)
    content = CfgNode(yaml.safe_load((out / "config.yaml").read_text()))
    remove_crosskd_ifc_config(content)
    (tmp_path / "stock.yaml").write_text(content.dump())
    get_cfg().merge_from_file(str(tmp_path / "stock.yaml"))
