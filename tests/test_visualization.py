"""Pictures and plots."""

import json

import numpy as np
import pytest
import torch
from common import distilling, tiny_batch, tiny_cfg
from detectron2.data import DatasetCatalog, build_detection_test_loader
from PIL import Image

from crosskd_ifc.shapes import CLASSES, register_shapes
from crosskd_ifc.visualization import (
    COLUMNS,
    compare_on_dataset,
    draw_boxes,
    plot_curves,
    predict_all,
    read_metrics,
)


def test_predictions_of_all_three_are_detections_of_their_own_heads():
    student, teacher = distilling(
        "MODEL.CROSSKD.FUSION.NAME", "none", "MODEL.CROSSKD.FUSION.IN_FEATURES", ("fc2",)
    )
    student.eval()
    batch = tiny_batch()
    found = predict_all(student, batch)
    assert set(found) == {"teacher", "cross-head", "student"}
    with torch.no_grad():
        for name, model in (("teacher", teacher), ("student", student)):
            expected = model(batch)[0]["instances"]
            assert torch.equal(found[name][0].scores, expected.scores)
    # With the teacher's predictor in the student, its cross-head is its own head.
    student.roi_heads.box_predictor.load_state_dict(teacher.roi_heads.box_predictor.state_dict())
    found = predict_all(student, batch)
    assert len(found["student"][0]) > 0
    assert torch.equal(found["student"][0].scores, found["cross-head"][0].scores)


def test_the_comparison_of_a_data_set_is_written_as_a_picture(tmp_path):
    (name,) = register_shapes(
        "picture_test", root=str(tmp_path / "data"), num_images={"test": 5}, image_size=64
    )
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), "DATASETS.TEST", (name,))
    student, _ = distilling(*classes, teacher_opts=classes)
    loader = build_detection_test_loader(tiny_cfg(*classes), name, num_workers=0)
    path = tmp_path / "picture.png"
    compare_on_dataset(
        student, loader, DatasetCatalog.get(name), CLASSES, str(path), images=2, threshold=0.1
    )
    width, height = Image.open(path).size
    assert width == 300 * len(COLUMNS) and height > 2 * 300


def test_boxes_are_drawn_where_they_are_on_an_enlarged_picture():
    blank = np.zeros((32, 32, 3), np.uint8)
    red = (1.0, 0.0, 0.0)
    drawn = draw_boxes(blank, np.array([[8.0, 8.0, 24.0, 24.0]]), [""], [red], height=320)
    assert drawn.shape == (320, 320, 3)
    ys, xs = np.nonzero(drawn[..., 0] > 100)
    assert abs(xs.min() - 80) < 6 and abs(xs.max() - 240) < 6 and abs(ys.min() - 80) < 6
    empty = draw_boxes(blank, np.zeros((0, 4)), [], [])
    assert not empty.any()


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.json"
    lines = [
        {"iteration": 19, "loss_cls": 1.0, "loss_cls_kd": 0.5},
        {"iteration": 20, "bbox/AP": 9},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 2')
    return path


def test_a_line_that_is_still_being_written_is_left_out(metrics):
    assert [line["iteration"] for line in read_metrics(str(metrics))] == [19, 20]


def test_curves_of_runs_with_and_without_distillation_are_plotted(metrics, tmp_path):
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({"iteration": 20, "bbox/AP": 5.0, "loss_cls": 2.0}) + "\n")
    path = tmp_path / "plot.png"
    plot_curves({"distilled": str(metrics), "plain": str(plain)}, str(path), title="a title")
    assert Image.open(path).size[0] > 1000
