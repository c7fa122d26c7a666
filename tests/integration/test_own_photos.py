"""From a folder of photos in each layout to predictions, by the tools alone."""

import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from PIL import Image
from test_new_card import LAYOUTS, draw

# Wide enough for a detector, narrow enough for seconds.
TINY = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.RESNETS.DEPTH 50 MODEL.FPN.OUT_CHANNELS 64 "
    "SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 "
    "TEST.EVAL_PERIOD 0 MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8"
).split()
DETECTORS = {"voc": "faster_rcnn", "coco": "mask_rcnn", "yolo": "retinanet", "csv": "fcos"}


@pytest.mark.parametrize(
    "layout", ["voc", *(pytest.param(x, marks=pytest.mark.slow) for x in ("coco", "yolo", "csv"))]
)
def test_from_a_folder_of_photos_to_predictions(layout, tmp_path, run_tool):
    assert set(LAYOUTS) == set(DETECTORS)
    photos, card, configs = tmp_path / "photos", tmp_path / "own.yaml", tmp_path / "configs"
    photos.mkdir()
    LAYOUTS[layout](photos)
    run_tool("prepare_data.py", "init", photos, "--output", card, "--split", "0.6/0.2/0.2")
    assert "0 errors" in run_tool("prepare_data.py", "check", card)
    options = ["--teacher", "R50", "--student", "R50", "--detector", DETECTORS[layout]]
    options += ["--from-scratch", "--gpus", 0, "--output", configs]
    run_tool("prepare_data.py", "configs", card, *options)
    for name in ("teacher", "distilled"):
        opts = [*TINY]
        if name == "distilled":
            opts += ["MODEL.CROSSKD.TEACHER.OPTS", repr(tuple(TINY))]
        run_tool("train_net.py", "--config-file", configs / f"{name}.yaml", *opts)
        log = (configs / "output" / name / "log.txt").read_text()
        assert ("_kd" in log) == (name == "distilled")
    student, out = tmp_path / "student", tmp_path / "out"
    run_tool("export_student.py", configs / "output/distilled/model_final.pth", student)
    classes = json.loads((student / "metadata.json").read_text())["classes"]
    assert len(classes) == 2

    if DETECTORS[layout] != "fcos":  # of which stock detectron2 has no such config
        cfg = get_cfg()
        cfg.merge_from_file(str(student / "config.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        found = DefaultPredictor(cfg)(np.array(draw(3))[:, :, ::-1])
        assert found["instances"].image_size == (64, 96)

    words = ["--teacher", configs / "output/teacher", "--device", "cpu"]
    words += ["--output", out, "--json", tmp_path / "r.json"]
    assert "20 images, " in run_tool("predict.py", student, photos, *words)
    pictures = [path for path in out.rglob("*") if path.is_file()]
    assert len(pictures) == 20
    # Side by side, and none of the photos is written over.
    assert all(Image.open(p).width == 2 * 480 for p in pictures)
    assert len({x["file_name"] for x in json.loads((tmp_path / "r.json").read_text())}) <= 20
    assert {x["category"] for x in json.loads((tmp_path / "r.json").read_text())} <= set(classes)
