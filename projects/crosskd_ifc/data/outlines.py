"""Looks at COCO outlines before detectron2 and pycocotools, which crash or hang on wrong numbers.

An outline (a ``segmentation``) is a list of polygons, each [x1, y1, x2, y2, ...] in pixels, or a
run-length code (RLE): ``size`` is [height, width], ``counts`` the lengths of the runs, as a list or
in COCO's compressed text.
"""

import math
from reprlib import repr as short
from typing import Any, Iterable, Optional, Sequence, Tuple

import numpy as np

from .mapper import SampleError

# Far beyond any image, and small enough for pycocotools, which draws edges at five times the size.
_FARTHEST = 10**6
_LONGEST = 12  # characters of one run: 60 bits


def is_outline(value: Any) -> bool:
    """Whether a value has the form of an outline: none, a list of lists, or a mapping."""
    if isinstance(value, list):
        return all(isinstance(polygon, (list, np.ndarray)) for polygon in value)
    return not value or isinstance(value, dict)


def is_drawable(outline: Any) -> bool:
    """Whether detectron2 makes a mask of an outline that is there and has no
    :func:`outline_fault`: of a list, one polygon of three points is enough. It leaves out an object
    whose outline has none."""
    if isinstance(outline, dict):
        return True
    return any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in outline)


def outline_fault(outline: Any, size: Optional[Tuple[int, int]] = None) -> str:
    """Returns what is wrong with the numbers of an outline, or "".

    Args:
        outline: of the form that :func:`is_outline` asks for.
        size: (height, width) of the image, which the size of an RLE must be; None if unknown.
    """
    if isinstance(outline, dict):
        return _rle_fault(outline, size) if outline else ""
    faults = (_polygon_fault(polygon) for polygon in outline or ())
    return next((fault for fault in faults if fault), "")


def check_outlines(records: Iterable[dict], *, polygons: bool) -> None:
    """Refuses training data for masks in which an object has no usable outline.

    Args:
        records: in detectron2's format. Crowds are left out, as in training.
        polygons: whether they are read as polygons (INPUT.MASK_FORMAT).

    Raises:
        SampleError: names the image and the object.
    """
    for record in records:
        size = record.get("height"), record.get("width")
        for number, annotation in enumerate(record.get("annotations", ()), 1):
            if annotation.get("iscrowd", 0):
                continue
            outline = annotation.get("segmentation")
            if outline is None or not len(outline):
                fault = "it has no outline, which MODEL.MASK_ON True needs of every object"
            elif not is_outline(outline):
                fault = "it is no list of polygons, and no run-length code"
            elif polygons and isinstance(outline, dict):
                fault = "it is a run-length code; set INPUT.MASK_FORMAT 'bitmask' to train on it"
            else:
                fault = outline_fault(outline, size if None not in size else None)
            if fault:
                name = record.get("file_name", f"image id {record.get('image_id')}")
                raise SampleError(f"{name}: segmentation of object {number}: {fault}")


def _polygon_fault(polygon: Sequence) -> str:
    if not len(polygon):
        return ""  # skipped by all readers, as all of less than three points
    try:
        total, low, high = float(sum(polygon)), min(polygon), max(polygon)
    except OverflowError:
        return "a coordinate is beyond any image"
    except (TypeError, ValueError):
        return "a polygon's coordinates are not all numbers"
    if not math.isfinite(total):  # one that is NaN or infinite makes the sum so
        return "a coordinate is not finite"
    if low < -_FARTHEST or high > _FARTHEST:
        return "a coordinate is beyond any image"
    return ""


def _rle_fault(rle: dict, size: Optional[Tuple[int, int]]) -> str:
    found, counts = rle.get("size"), rle.get("counts")
    good = isinstance(found, (list, tuple)) and len(found) == 2
    if not good or not all(isinstance(n, int) and 0 < n < _FARTHEST for n in found):
        return f"its size is {short(found)}; expected the image's [height, width]"
    if size is not None and tuple(found) != tuple(size):
        return f"its size is {short(found)}, but the image's [height, width] is {list(size)}"
    if isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts):
        total = sum(counts)
    elif isinstance(counts, (str, bytes)):
        total = _decoded_sum(counts)
    else:
        total = -1
    if total < 0:
        return f"its counts, {short(counts)}, are no run lengths"
    if total != found[0] * found[1]:
        return f"its counts are {short(total)} pixels, but its size {short(found)} has others"
    return ""


def _decoded_sum(counts: Any) -> int:
    """Pixels of COCO's compressed counts; -1 if they are none.

    Five bits to a character from "0" on, the lowest first; the sixth bit says that the number goes
    on, and the fifth of its last character is the sign. From the fourth number on, each is the
    difference to that two places before.
    """
    raw = counts if isinstance(counts, bytes) else counts.encode("utf-8", "replace")
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return -1
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST:
        return -1
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs = np.concatenate((values[:1], np.cumsum(values[1::2]), np.cumsum(values[2::2])))
    if (abs(runs) >= 2**40).any():
        return -1
    return int(runs.sum()) if (runs >= 0).all() else -1
