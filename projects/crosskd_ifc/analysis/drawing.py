"""Boxes, masks and labels on a picture.

matplotlib and detectron2's visualizer are imported inside the functions: training needs neither.
"""

import colorsys
from typing import List, Optional, Sequence, Tuple

import cv2
import numpy as np

from ..common.plotting import literal

_LABEL_SIZE = 7  # points
_LONGEST = 2000  # pixels of an enlarged picture


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[Tuple[float, float, float]],
    *,
    masks: Optional[np.ndarray] = None,
    height: int = 320,
) -> np.ndarray:
    """A resized copy of an image with boxes, drawn by detectron2's visualizer, and their labels,
    which don't cover each other where there is room.

    Args:
        image: (H, W, 3) RGB uint8.
        boxes: (B, 4) xyxy in pixels of ``image``.
        labels: B texts.
        colors: B RGB colours in [0, 1].
        masks: (B, H, W) binary.
        height: height of the result in pixels, so that labels stay readable on small images. A thin
            image is enlarged to a length of 2000 pixels at most.

    Returns:
        (height, width, 3) RGB uint8.
    """
    from detectron2.utils.visualizer import Visualizer

    scale = min(height / image.shape[0], max(1.0, _LONGEST / max(image.shape[:2])))
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    smooth = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    canvas = Visualizer(cv2.resize(image, size, interpolation=smooth))
    if masks is not None:
        masks = [cv2.resize(m.astype(np.float32), size) > 0.5 for m in masks]
    canvas.overlay_instances(
        boxes=boxes * scale, masks=masks, assigned_colors=list(colors), alpha=0.4
    )
    _draw_labels(canvas, boxes * scale, labels, colors)
    return canvas.output.get_image()


def _draw_labels(canvas, boxes: np.ndarray, labels: Sequence[str], colors: Sequence) -> None:
    """Write each label at its box, the first of its :func:`_places` where it covers least."""
    from matplotlib.transforms import Bbox

    output, taken = canvas.output, np.zeros((0, 4))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for i in np.argsort(areas, kind="stable"):  # the smallest have the least choice
        if not labels[i]:
            continue
        light = tuple(0.4 + 0.6 * channel for channel in colors[i])  # on a black ground
        options = dict(font_size=_LABEL_SIZE, horizontal_alignment="left", color=light)
        canvas.draw_text(literal(labels[i]), tuple(boxes[i, :2]), **options)
        text, renderer = output.ax.texts[-1], output.canvas.get_renderer()
        text.update_bbox_position_size(renderer)
        extent = text.get_bbox_patch().get_window_extent(renderer)
        corners = Bbox(output.ax.transData.inverted().transform(extent)).extents
        left, top = np.minimum(corners[:2], corners[2:])
        margin = boxes[i, :2] - (left, top)  # from the text to the edge of its ground
        size = np.abs(corners[2:] - corners[:2])
        places = _places(boxes[i], size, (output.width, output.height))
        covered = [_overlap(place, taken) for place in places]
        best = places[int(np.argmin(covered))]
        text.set_position(best[:2] + margin)
        taken = np.vstack([taken, best])


def _places(box: np.ndarray, size: np.ndarray, picture: Tuple[int, int]) -> np.ndarray:
    """Where a label can stand: at the corners of its box, inside and outside, then along its
    sides; each (x0, y0, x1, y1) and inside the picture.

    Args:
        box: (4,) xyxy.
        size: width and height of the label.
        picture: width and height.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    corners = [
        *((x0, y0), (x0, y0 - height), (x0, y1), (x0, y1 - height)),
        *((x1 - width, y0), (x1 - width, y0 - height), (x1 - width, y1), (x1 - width, y1 - height)),
        *((x1, y0), (x0 - width, y0), (x1, y1 - height), (x0 - width, y1 - height)),
    ]
    steps = np.arange(y0 + height, y1 - height, height)
    corners += [(x, y) for y in steps for x in (x0, x1 - width, x1, x0 - width)]
    limits = np.maximum(np.array(picture) - size, 0)
    found = np.clip(np.array(corners), 0, limits)
    return np.hstack([found, found + size])


def _overlap(place: np.ndarray, taken: np.ndarray) -> float:
    """The area of ``place`` that (L, 4) others cover; what several cover counts as often."""
    low, high = np.maximum(place[:2], taken[:, :2]), np.minimum(place[2:], taken[:, 2:])
    return float((high - low).clip(min=0).prod(axis=1).sum())


def bright_colors(count: int) -> List[Tuple[float, float, float]]:
    """Evenly spread hues, all light enough to read on a photo and on a label's black ground."""
    return [colorsys.hsv_to_rgb(i / count, 0.75, 1.0) for i in range(count)]
