"""tools/train_net.py with dense detectors, on a handful of pictures of the built-in kind."""

import json

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import load_tool
from test_dense import DENSE, dense_cfg, telling

from crosskd_ifc import ConfigError
from crosskd_ifc.data.shapes import CLASSES, generate

train_net = load_tool("train_net")


def settings(kind):
    node = "FCOS" if kind == "FCOS" else "RETINANET"
    return (
        *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
        *(f"MODEL.{node}.NUM_CLASSES", len(CLASSES), "SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.001, "SEED", 3, "SOLVER.STEPS", ()),
        *("MODEL.FPN.OUT_CHANNELS", 64),  # GN needs more than one number per group
    )


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_student_trains_resumes_and_evaluates_without_its_teacher(kind, tmp_path):
    generate(str(tmp_path / "data"), num_images={"train": 4, "test": 2}, image_size=64, seed=3)
    splits = {s: {"json": f"annotations/{s}.json", "images": s} for s in ("train", "test")}
    card = {"name": "denseshapes", "format": "coco", "root": "data", "splits": splits}
    card |= {"classes": list(CLASSES), "evaluator": "coco"}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    teacher = dense_cfg(kind, *settings(kind), stock=True)
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    DetectionCheckpointer(telling(build_model(teacher), 7), str(tmp_path)).save("teacher")
    student = dense_cfg(
        kind,
        *settings(kind),
        *("MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")),
        *("MODEL.CROSSKD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")),
        *("MODEL.CROSSKD.FUSION.NAME", "weighted", "MODEL.CROSSKD.TEACHER.EVAL_AT_START", True),
        *("DATASETS.CARDS", (str(tmp_path / "card.yaml"),), "OUTPUT_DIR", str(tmp_path / "run")),
        *("DATASETS.TRAIN", ("denseshapes_train",), "DATASETS.TEST", ("denseshapes_test",)),
    )
    (tmp_path / "student.yaml").write_text(student.dump())

    def run(*arguments):
        words = ["--config-file", str(tmp_path / "student.yaml"), *map(str, arguments)]
        return train_net.main(default_argument_parser().parse_args(words))

    run("SOLVER.MAX_ITER", 1)
    run("--resume", "SOLVER.MAX_ITER", 2)
    last = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    learned = {n for n in last["model"] if n.startswith("fusion.")}
    assert last["iteration"] == 1
    assert learned == {"fusion.cls.combine.scores", "fusion.bbox.combine.scores"}
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"loss_cls_kd", "loss_box_reg_kd", "bbox/AP", "teacher/bbox/AP"} <= logged
    gone = ("MODEL.CROSSKD.TEACHER.WEIGHTS", "gone.pth")
    weights = ("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth")
    results = run("--eval-only", *weights, *gone, "OUTPUT_DIR", tmp_path / "eval")
    assert results["bbox"]["AP"] == pytest.approx(lines[-1]["bbox/AP"], nan_ok=True)
    with pytest.raises(ConfigError, match="TEACHER.WEIGHTS: there is no file 'gone.pth'"):
        run(*gone)
