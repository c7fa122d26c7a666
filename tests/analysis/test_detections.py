"""Pictures and plots."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from helpers import distilling, tiny_batch
from PIL import Image

from crosskd_ifc.analysis import curves
from crosskd_ifc.analysis import detections as visualization
from crosskd_ifc.analysis.curves import plot_curves, read_metrics
from crosskd_ifc.analysis.detections import (
    COLUMNS,
    compare_detections,
    draw_boxes,
    predict_all,
    spread_evenly,
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


@pytest.mark.parametrize("mimic, columns", [("cross_head", 3), ("student_head", 2)])
def test_columns_without_content_are_left_out(tmp_path, mimic, columns):
    student, _ = distilling("MODEL.CROSSKD.MIMIC", mimic)
    found = predict_all(student.eval(), tiny_batch(images=1))
    assert list(found) == [c for c in COLUMNS[1:] if mimic == "cross_head" or c != "cross-head"]
    image, path = tmp_path / "image.png", tmp_path / "picture.png"
    Image.new("RGB", (64, 32)).save(image)
    inputs = {"image": torch.zeros(3, 32, 64), "height": 32, "width": 64, "file_name": str(image)}
    names = dict.fromkeys(COLUMNS, ("0", "1", "2"))
    compare_detections(student, [inputs] * 2, names, str(path))
    width, height = Image.open(path).size
    assert width == 300 * columns and 300 < height < 400  # as wide as ever, half as high


def test_masks_of_ground_truth_and_detections_are_drawn_and_crowds_are_not(tmp_path, monkeypatch):
    drawn = []

    def keep(image, boxes, labels, colors, *, masks=None, height):
        drawn.append((boxes, labels, None if masks is None else masks.sum(axis=(1, 2))))
        return np.zeros((height, 320, 3), np.uint8)

    monkeypatch.setattr(visualization, "draw_boxes", keep)
    masks = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    student, _ = distilling(*masks, teacher_opts=masks)
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    square = {"bbox": [8, 8, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    square["segmentation"] = [[8, 8, 18, 8, 18, 18, 8, 18]]
    annotations = [square, {**square, "iscrowd": 1}]
    inputs = {**tiny_batch()[0], "file_name": str(image)}
    names = dict.fromkeys(COLUMNS, ("a", "b", "c"))
    path = str(tmp_path / "picture.png")
    compare_detections(student, [inputs], names, path, annotations=[annotations], threshold=0.1)
    truth, teacher, _, mine = drawn
    assert truth[0].tolist() == [[8, 8, 18, 18]] and truth[1] == ["b"] and truth[2] == [100]
    for boxes, labels, areas in (teacher, mine):
        assert len(boxes) == len(labels) == len(areas) > 0


def test_a_mask_is_filled_on_the_enlarged_picture():
    blank, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32), bool)
    mask[:, 8:24, 8:24] = True
    box = np.array([[4.0, 4.0, 28.0, 28.0]])
    drawn = draw_boxes(blank, box, [""], [(1.0, 0.0, 0.0)], masks=mask, height=320)
    assert (drawn[100:220, 100:220, 0] > 60).all() and not drawn[50:70, 60:260].any()


def test_images_are_spread_evenly_and_each_is_taken_once():
    assert spread_evenly(4, 300) == [60, 120, 179, 239]
    assert spread_evenly(2, 5) == [1, 3]
    for count, total in ((1, 1), (1, 2), (4, 5), (4, 4), (9, 4), (4, 6)):
        found = spread_evenly(count, total)
        assert len(set(found)) == min(count, total) and set(found) <= set(range(total))


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


def test_losses_of_the_stages_of_a_cascade_are_drawn_as_their_sum(tmp_path, monkeypatch):
    drawn = []
    keep = lambda figure, path: drawn.extend(figure.axes)  # noqa: E731
    monkeypatch.setattr(curves, "save_figure", keep)
    keys = ("loss_cls_stage0", "loss_cls_stage1", "loss_cls_stage0_kd", "loss_cls_stage1_kd")
    line = {"iteration": 20, **dict(zip(keys, (1.0, 2.0, 4.0, 8.0)))}
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps(line) + "\n")
    plot_curves({"cascade": str(metrics)}, "", title="")
    values = {axis.get_title(): [list(x.get_ydata()) for x in axis.lines] for axis in drawn}
    assert values["classification loss (ground truth)"] == [[3.0]]
    assert values["classification loss (distillation)"] == [[12.0]]
