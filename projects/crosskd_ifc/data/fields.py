"""What detectron2 and its evaluators read in annotation files, and what it must be."""

import math
import re
from reprlib import repr as short
from typing import Any, Callable, Container, Dict, Tuple

from .files import read_voc_lines
from .outlines import is_outline


def voc_list_fault(root: str, split: str) -> str:
    """Returns what keeps detectron2's VOC evaluator from reading a split's list, or ""."""
    path, lines = read_voc_lines(root, split)
    # To it, that is an image without a name.
    return "" if all(line.strip() for line in lines) else f"{path}: an empty line"


def voc_evaluator_fault(element) -> str:
    """Returns the first field that detectron2's VOC evaluator couldn't read, or ""."""
    corners = [f"bndbox/{corner}" for corner in ("xmin", "ymin", "xmax", "ymax")]
    for tag in ("pose", "truncated", "difficult", *corners):
        try:
            text = element.find(tag).text
            if tag != "pose":
                int(text)
        except (AttributeError, TypeError, ValueError):
            return f"<{tag.split('/')[-1]}>"
    return ""


def coco_evaluator_fault(content: Dict[str, Any], *, masks: bool, keypoints: int = 0) -> str:
    """Returns the first record and field of a COCO file that the COCO evaluator couldn't read, or
    "".

    Args:
        content: as loading accepts it.
        masks: whether masks are evaluated too.
        keypoints: how many are evaluated too, 0 for none.
    """
    for record in content["categories"]:
        fault = _first_fault(record, {"id": _ID})
        if fault:
            return f"category {short(record.get('id'))}: {fault}"
    needed = _evaluated_fields(masks, keypoints)
    for record in content.get("annotations", []):
        fault = _first_fault(record, needed)
        if fault:
            return f"annotation {short(record.get('id'))}: {fault}"
    return ""


def _evaluated_fields(masks: bool, keypoints: int) -> Dict[str, Tuple[Callable, str]]:
    needed = {
        "id": (_is_found, f"{_ID[1]}, and not 0: it never counts a box of id 0 as found"),
        "bbox": (_is_box, "a list of four numbers"),
        "area": (_is_area, "a number of pixels, 0 or more"),
        "iscrowd": (_is_flag, "0 or 1"),
    }
    if masks:
        needed["segmentation"] = (_is_mask, "polygons of at least three points, or a run length")
    if keypoints:
        needed["keypoints"] = (
            lambda value: isinstance(value, list) and len(value) == 3 * keypoints,
            f"three numbers for each of {keypoints} keypoints",
        )
        needed["num_keypoints"] = (_is_int, "a whole number")
    return needed


def text_id_fault(record: Dict[str, Any], images: Container[Any]) -> str:
    """Returns what is wrong with an annotation whose image_id would be an image's id, if one of the
    two weren't text, or "".

    Args:
        images: the ids of all images.
    """
    image_id = record.get("image_id")
    if isinstance(image_id, str) and re.fullmatch(r"-?[0-9]{1,18}", image_id):
        other, kinds = int(image_id), ("text", "a number")
    elif isinstance(image_id, int):
        other, kinds = str(image_id), ("a number", "text")
    else:
        return ""
    if image_id in images or other not in images:
        return ""
    return f"its image_id {short(image_id)} is {kinds[0]}, but the id of the image is {kinds[1]}"


def _first_fault(record: Dict[str, Any], needed: Dict[str, Tuple[Callable, str]]) -> str:
    for key, (test, expected) in needed.items():
        if not test(record.get(key)):
            found = f"is {short(record[key])}" if key in record else "is missing"
            return f"{key!r} {found}; the COCO evaluator needs {expected}"
    return ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**53  # pycocotools keeps them in floats


def _is_found(value: Any) -> bool:
    return _is_int(value) and value != 0  # pycocotools takes 0 for "not matched"


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 10**6


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or _is_int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    # json reads nan and inf, and integers that no float can hold.
    return isinstance(value, float) or isinstance(value, int) and abs(value) < 1e300


def _is_area(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)


def _is_mask(value: Any) -> bool:
    # pycocotools goes by the length of the first polygon; up to 4 numbers are a box to it.
    return bool(value) and (isinstance(value, dict) or len(value[0]) > 4)


_ID = (_is_int, "a whole number, less than 2**53")

# The fields of a COCO file that detectron2 or its evaluator read, with what they must be.
CATEGORY_FIELDS = {"id": _is_int, "name": _is_text}
IMAGE_FIELDS = {"id": _is_id, "file_name": _is_text, "width": _is_length, "height": _is_length}
ANNOTATION_FIELDS = {
    "id": _is_int,
    "image_id": _is_id,
    "category_id": _is_int,
    "bbox": _is_box,
    "area": _is_area,
    "iscrowd": _is_flag,
    "segmentation": is_outline,  # a flat list of numbers is the usual mistake
    "ignore": lambda value: not value,  # detectron2 asserts that it is off
}
