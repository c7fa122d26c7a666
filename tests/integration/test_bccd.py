"""Real photos: the BCCD blood cells, from the check of the data to a resumed, evaluated student."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from test_train_net import metrics, run

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
BCCD = os.path.abspath(
    os.environ.get("CROSSKD_IFC_BCCD", os.path.join(ROOT, "..", "shared", "data", "bccd"))
)
pytestmark = pytest.mark.skipif(
    not os.path.isdir(BCCD),
    reason=f"no BCCD photos in {BCCD}; set CROSSKD_IFC_BCCD to their folder",
)
SMALL = {
    "INPUT": {
        "MIN_SIZE_TRAIN": [64],
        "MAX_SIZE_TRAIN": 96,
        "MIN_SIZE_TEST": 64,
        "MAX_SIZE_TEST": 96,
    },
    "SOLVER": {"MAX_ITER": 4, "STEPS": [3], "CHECKPOINT_PERIOD": 2, "IMS_PER_BATCH": 2},
    "DATASETS": {
        "CARDS": ["datasets/bccd.yaml"],
        "TRAIN": ["bccd_train"],
        "TEST": ["bccd_test"],
    },
    "TEST": {"EVAL_PERIOD": 4},
    "VERSION": 2,
}


@pytest.fixture
def bccd(monkeypatch):
    monkeypatch.setenv("CROSSKD_IFC_BCCD", BCCD)


def test_the_check_reports_exactly_the_two_boxes_without_area_as_errors(bccd):
    command = [sys.executable, os.path.join(ROOT, "tools", "prepare_data.py"), "check"]
    done = subprocess.run(
        [*command, "datasets/bccd.yaml"], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    assert "2 errors, 1 warning" in done.stdout  # two photos look alike, in train and val
    for name in ("BloodImage_00338", "BloodImage_00343"):
        assert name in done.stdout


def write(folder, name, content, out, base):
    config = {"_BASE_": os.path.join(ROOT, "configs", "quick", base), **SMALL, **content}
    config["OUTPUT_DIR"] = str(out)
    (folder / name).write_text(yaml.safe_dump(config))
    return str(folder / name)


def model(**more):
    heads = {"NUM_CLASSES": 3, "BATCH_SIZE_PER_IMAGE": 16, "SCORE_THRESH_TEST": 0.01}
    heads.update(more.pop("ROI_HEADS", {}))
    narrow = {
        "RPN": {"POST_NMS_TOPK_TRAIN": 50, "POST_NMS_TOPK_TEST": 50},
        "FPN": {"OUT_CHANNELS": 16},
    }
    return {"MODEL": {"ROI_HEADS": heads, **narrow, **more}}


def test_teacher_student_evaluation_and_resume_run_on_the_photos(bccd, tmp_path, caplog):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    base = "faster_rcnn_R_18_shapes.yaml"
    teacher_config = write(tmp_path, "teacher.yaml", model(), teacher, base)
    run(
        teacher_config,
        "SOLVER.MAX_ITER",
        1,
        "TEST.EVAL_PERIOD",
        0,
        "DATASETS.TEST",
        "('bccd_val',)",
    )

    distil = {
        "META_ARCHITECTURE": "CrossKDRCNN",
        "ROI_HEADS": {"NAME": "CrossKDROIHeads"},
        "CROSSKD": {
            "TEACHER": {
                "CONFIG_FILE": teacher_config,
                "WEIGHTS": str(teacher / "model_final.pth"),
            }
        },
    }
    student_config = write(tmp_path, "student.yaml", model(**distil), student, base)
    run(student_config, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0)
    run(student_config, "--resume")
    logged = {key: value for line in metrics(student) for key, value in line.items()}
    assert max(line["iteration"] for line in metrics(student)) >= 3
    assert "bbox/AP" in logged and logged["loss_cls_kd"] > 0

    weights = ("MODEL.WEIGHTS", student / "model_final.pth", "OUTPUT_DIR", tmp_path / "eval")
    results = run(student_config, "--eval-only", *weights)
    assert results["bbox"]["AP"] == pytest.approx(logged["bbox/AP"], nan_ok=True)
    # After a few steps the AP is next to nothing: compare the detections, too.
    assert detections(student) == detections(tmp_path / "eval") != []


def detections(folder):
    with open(folder / "inference" / "coco_instances_results.json") as f:
        return json.load(f)


def test_training_says_how_many_boxes_it_drops(bccd, tmp_path, caplog):
    from helpers import tiny_cfg

    from crosskd_ifc import CrossKDTrainer
    from crosskd_ifc.data.cards import register_cards

    register_cards(["datasets/bccd.yaml"])
    cfg = tiny_cfg("DATASETS.TRAIN", ("bccd_trainval",))
    CrossKDTrainer.build_train_loader(cfg)
    assert "ropped 2 boxes" in caplog.text and "BloodImage_00338" in caplog.text
