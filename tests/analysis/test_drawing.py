"""Boxes and their labels on a picture."""

import itertools

import numpy as np
import pytest
from detectron2.utils.visualizer import VisImage

from crosskd_ifc.analysis.drawing import draw_boxes

BLANK = np.zeros((64, 96, 3), np.uint8)
GREEN = (0.0, 1.0, 0.0)


@pytest.fixture
def places(monkeypatch):
    """The place of each label that was drawn, text -> xyxy in pixels of the picture."""
    found = {}
    get_image = VisImage.get_image

    def keep(self):
        for text in self.ax.texts:
            box = text.get_window_extent(self.canvas.get_renderer())  # counted from below
            found[text.get_text()] = (box.x0, self.height - box.y1, box.x1, self.height - box.y0)
        return get_image(self)

    monkeypatch.setattr(VisImage, "get_image", keep)
    return found


def covered(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(width, 0) * max(height, 0)


@pytest.mark.parametrize(
    "boxes",
    [
        [[20, 20, 60, 50]] * 3,  # three answers of one object
        [[10, 10, 40, 40], [11, 11, 42, 41], [12, 9, 80, 60], [12, 12, 20, 20]],
        [[0, 0, 95, 63], [0, 0, 30, 20], [1, 1, 94, 62]],  # at the border
        [[70, 50, 95, 63], [71, 51, 95, 63], [60, 1, 95, 12]],
    ],
)
def test_labels_do_not_cover_each_other_where_there_is_room(boxes, places):
    labels = [f"class{i} 9{i}%" for i in range(len(boxes))]
    draw_boxes(BLANK, np.array(boxes, float), labels, [GREEN] * len(boxes), height=320)
    assert set(places) == set(labels)
    for a, b in itertools.combinations(places.values(), 2):
        assert covered(a, b) < 1
    for x0, y0, x1, y1 in places.values():
        assert x0 >= -1 and y0 >= -1 and x1 <= 481 and y1 <= 321  # all of it in the picture


def test_a_label_alone_stands_in_its_boxs_upper_left_corner(places):
    draw_boxes(BLANK, np.array([[20.0, 20, 60, 50]]), ["a"], [GREEN], height=320)
    assert places["a"][:2] == pytest.approx((100, 100), abs=2)


def test_more_labels_than_there_is_room_for_are_drawn_all_the_same(places):
    labels = [f"{i} a rather long name" for i in range(40)]
    draw_boxes(BLANK, np.array([[30.0, 30, 34, 34]] * 40), labels, [GREEN] * 40, height=320)
    assert set(places) == set(labels)


def test_a_dollar_sign_in_a_name_is_a_dollar_sign():
    plain, dollars = (
        draw_boxes(BLANK, np.array([[5.0, 5, 90, 60]]), [name], [GREEN], height=320)
        for name in ("1 to 2", "$1 to $2")
    )
    # A formula would have no spaces and no signs: it would be narrower, not wider.
    widths = [
        np.flatnonzero((x[30:44, 28:260] > 60).any(axis=(0, 2))).max() for x in (plain, dollars)
    ]
    assert widths[1] > widths[0] + 8
    draw_boxes(BLANK, np.array([[5.0, 5, 90, 60]]), [r"$\frac$"], [GREEN])  # as a formula an error
