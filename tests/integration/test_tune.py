"""tools/tune.py from the command line: real trainings of a few steps."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from crosskd_ifc.data.shapes import CLASSES, generate

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
WEIGHT = "MODEL.CROSSKD.LOSS.FEATURE_WEIGHT"
SMALL = {
    "DATASETS.CARDS": ["card.yaml"],
    "DATASETS.TRAIN": ["few_train"],
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": [],
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.EVAL_PERIOD": 1,
}


@pytest.mark.slow  # tests/experiments/test_tuning.py has the parts
def test_a_search_trains_its_teacher_and_its_trials_and_says_which_is_the_best(tmp_path):
    sizes = {"train": 4, "val": 2, "test": 2}
    generate(str(tmp_path / "shapes"), num_images=sizes)
    card = {
        "name": "few",
        "format": "coco",
        "root": "shapes",
        "splits": {s: {"json": f"annotations/{s}.json", "images": s} for s in sizes},
        "classes": list(CLASSES),
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    protocol = {
        "name": "tiny",
        "seeds": [1],
        "validation": "few_val",
        "test": "few_test",
        "opts": SMALL,
        "teacher": {"config": "quick/faster_rcnn_R_34_shapes.yaml"},
        "arms": {"mgd": {"config": "quick/options/mgd_R_18_shapes.yaml"}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(protocol))
    words = [os.path.join(ROOT, "tools", "tune.py"), "tiny.yaml", "mgd", "--budget", "2"]
    words += ["--log", WEIGHT, "1e-6", "1e-4", "--device", "cpu", "--threads", "1"]

    def run():
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=1200
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Best on few_val: AP" in done.stdout and f"{WEIGHT} " in done.stdout
    folder = tmp_path / "output" / "tune" / "tiny_mgd"
    content = json.loads((folder / "results.json").read_text())
    assert [(r["arm"] == "teacher", r["seed"]) for r in content["runs"]] == [
        (True, 1),
        (False, 1),
        (False, 1),
    ]
    weights = {a["title"]: a["opts"] for a in content["arms"]}
    assert "FEATURE_WEIGHT 2e-05" in weights, "the arm as it stands"
    assert (folder / "report.md").exists()
    runs = tmp_path / "output" / "compare" / "tiny"
    before = sorted(p.stat().st_mtime_ns for p in runs.glob("*/run.json"))
    assert len(before) == 3
    done = run()
    assert done.returncode == 0 and "Best on few_val: AP" in done.stdout
    assert sorted(p.stat().st_mtime_ns for p in runs.glob("*/run.json")) == before
