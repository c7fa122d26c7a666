"""From a folder of photos in each layout to an exported student, by the tools alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from test_new_card import LAYOUTS, draw

REPO = Path(__file__).resolve().parents[2]
# Wide enough for a detector, narrow enough for seconds.
TINY = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.RESNETS.DEPTH 50 MODEL.FPN.OUT_CHANNELS 8 "
    "SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 "
    "TEST.EVAL_PERIOD 0 MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8"
).split()
DETECTORS = {"voc": "faster_rcnn", "coco": "mask_rcnn", "yolo": "retinanet", "csv": "fcos"}


def run(tool, *args):
    env = {**os.environ, "PYTHONPATH": str(REPO / "projects"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(REPO / "tools" / tool), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "layout", ["voc", *(pytest.param(x, marks=pytest.mark.slow) for x in ("coco", "yolo", "csv"))]
)
def test_from_a_folder_of_photos_to_an_exported_student(layout, tmp_path):
    photos, card, configs = tmp_path / "photos", tmp_path / "own.yaml", tmp_path / "configs"
    photos.mkdir()
    LAYOUTS[layout](photos)
    run("prepare_data.py", "init", photos, "--output", card, "--split", "0.6/0.2/0.2")
    assert "0 errors" in run("prepare_data.py", "check", card)
    options = ["--teacher", "R50", "--student", "R50", "--detector", DETECTORS[layout]]
    options += ["--from-scratch", "--gpus", 0, "--output", configs]
    run("prepare_data.py", "configs", card, *options)
    assert set(LAYOUTS) == set(DETECTORS)
    for name in ("teacher", "distilled"):
        opts = [*TINY]
        if name == "distilled":
            opts += ["MODEL.CROSSKD.TEACHER.OPTS", repr(tuple(TINY))]
        out = run("train_net.py", "--config-file", configs / f"{name}.yaml", *opts)
        folder = configs / "output" / name
        assert (folder / "model_final.pth").is_file()
        log = out + (folder / "log.txt").read_text()
        assert ("_kd" in log) == (name == "distilled")
    if DETECTORS[layout] == "fcos":  # stock detectron2 has no config for it
        return
    run("export_student.py", configs / "output/distilled/model_final.pth", tmp_path / "student")
    cfg = get_cfg()
    cfg.merge_from_file(str(next((tmp_path / "student").glob("*.yaml"))))
    cfg.MODEL.DEVICE = "cpu"
    found = DefaultPredictor(cfg)(np.array(draw(3))[:, :, ::-1])
    assert found["instances"].image_size == (64, 96)
