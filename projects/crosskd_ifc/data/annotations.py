"""The checks of annotations: VOC files and COCO json. A part of `check`.

Box shorthand: boxes are compared as they stand in the files, in pixels. In VOC files pixels count
from 1 and the last one is inside the box, so that 1 <= xmin < xmax <= width; in COCO files a box is
(x, y, width, height) from 0.
"""

import itertools
import math
import os
import re
from collections import Counter
from reprlib import repr as short
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from detectron2.utils.file_io import PathManager

from .files import read_coco_json, read_voc_annotation, read_voc_lines, read_voc_split
from .findings import Findings, quoted
from .outlines import is_outline, outline_fault

__all__ = [
    "ListedImage",
    "check_coco",
    "check_voc",
    "coco_category_fault",
    "coco_evaluator_fault",
    "text_id_fault",
    "voc_evaluator_fault",
    "voc_list_fault",
]

_COCO_SLACK = 0.05  # COCO files round x and width on their own

Size = Optional[Tuple[int, int]]


class ListedImage(NamedTuple):
    """An image that a split lists; ``size`` is the (width, height) of the annotation."""

    path: str
    size: Size


def check_voc(report: Findings, split: str) -> List[ListedImage]:
    """Reads a VOC split's list and annotations; adds findings and counts to ``report``.

    Returns:
        The images that the split lists, each once.
    """
    card, counts = report.card, report.counts[split]
    try:
        ids = read_voc_split(card.root, card.splits[split])
    except ValueError as error:
        report.add("unreadable split", str(error))
        return []
    for image_id, times in Counter(ids).items():
        if times > 1:
            report.add("duplicate id", f"ImageSets/Main/{card.splits[split]}.txt: {image_id}")
    if card.evaluator == "pascal_voc":
        fault = voc_list_fault(card.root, card.splits[split])
        if fault:
            report.add("not for the VOC evaluator", fault)
    pictures = []
    for image_id in dict.fromkeys(ids):
        image = os.path.join(card.root, "JPEGImages", image_id + ".jpg")
        path = os.path.join(card.root, "Annotations", image_id + ".xml")
        size, objects, seen = None, [], set()
        try:
            size, objects = read_voc_annotation(path)
            if not objects:
                report.add("image without boxes", path)
        except ValueError as error:
            if PathManager.isfile(path):
                report.add("unreadable annotation", str(error))
            else:
                report.add("missing annotation", path)
        pictures.append(ListedImage(image, size))
        for number, (name, box, element) in enumerate(objects, 1):
            where = f"{path} object {number}, {quoted(name)} {_numbers(box)}"
            counts["boxes"] += 1
            report.sizes[split].append((box[2] - box[0] + 1, box[3] - box[1] + 1))
            if name in report.classes:
                counts[report.classes.index(name)] += 1
            else:
                report.add("unknown class", where)
                report.unknown[name] += 1
            _check_box(report, where, box, size, first=1)
            if (name, *box) in seen:
                report.add("duplicate box", where)
            seen.add((name, *box))
            fault = voc_evaluator_fault(element) if card.evaluator == "pascal_voc" else ""
            if fault:
                report.add("not for the VOC evaluator", f"{where}: no usable {fault}")
    return pictures


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


def coco_evaluator_fault(record: Dict[str, Any], *, masks: bool) -> str:
    """Returns the first field of an annotation that the COCO evaluator couldn't read, or "".

    Args:
        record: as loading accepts it.
        masks: whether masks are evaluated too.
    """
    needed = {
        "id": _ID,
        "bbox": (_is_box, "a list of four numbers"),
        "area": (_is_area, "a number of pixels, 0 or more"),
        "iscrowd": (_is_flag, "0 or 1"),
    }
    if masks:
        needed["segmentation"] = (_is_mask, "polygons of at least three points, or a run length")
    return _first_fault(record, needed)


def coco_category_fault(record: Dict[str, Any]) -> str:
    """As `coco_evaluator_fault`, of a category."""
    return _first_fault(record, {"id": _ID})


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
_CATEGORY = {"id": _is_int, "name": _is_text}
_IMAGE = {"id": _is_id, "file_name": _is_text, "width": _is_length, "height": _is_length}
_ANNOTATION = {
    "id": _is_int,
    "image_id": _is_id,
    "category_id": _is_int,
    "bbox": _is_box,
    "area": _is_area,
    "iscrowd": _is_flag,
    "segmentation": is_outline,  # a flat list of numbers is the usual mistake
    "ignore": lambda value: not value,  # detectron2 asserts that it is off
}


def check_coco(report: Findings, split: str) -> List[ListedImage]:
    """Does for a COCO json file what `check_voc` does for a VOC split."""
    files, counts = report.card.splits[split], report.counts[split]
    try:
        content = read_coco_json(files["json"])
    except ValueError as error:
        report.add("unreadable split", str(error))
        return []

    def broken(what):
        report.add("broken record", f"{files['json']}: {what}")

    def valid(kind, record, fields):
        record = record if isinstance(record, dict) else {}
        bad = [key for key, test in fields.items() if not test(record.get(key))]
        if bad:
            named = f"{short(record['id'])}: " if "id" in record else ""
            broken(f"{kind} {named}{short(record)}, missing or wrong: {', '.join(bad)}")
        return not bad

    def unique(kind, key, seen):
        if key in seen:
            report.add("duplicate id", f"{files['json']}: {kind} {short(key)}")
        return key not in seen

    names: Dict[Any, str] = {}
    for record in content["categories"]:
        if valid("category", record, _CATEGORY) and unique("category", record["id"], names):
            unique("category name", record["name"], names.values())
            names[record["id"]] = record["name"]
    index = {category: i for i, category in enumerate(sorted(names))}
    classes = tuple(names[category] for category in index)
    report.classes = report.classes or classes
    if not classes:
        broken("no categories")
    elif classes != report.classes:
        pairs = enumerate(itertools.zip_longest(classes, report.classes))
        number, (here, there) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        report.add(
            "different classes", f"{files['json']}: class {number} is {here!r}, expected {there!r}"
        )

    images: Dict[Any, dict] = {}
    for record in content["images"]:
        if valid("image", record, _IMAGE) and unique("image", record["id"], images):
            images[record["id"]] = record
    if len(set(map(type, images))) > 1:
        broken("image ids are numbers and strings")  # detectron2 sorts them
    boxes: Dict[Any, set] = {image: set() for image in images}
    seen: set = set()
    for record in content.get("annotations", []):
        if not valid("annotation", record, _ANNOTATION):
            continue
        unique("annotation", record["id"], seen)
        seen.add(record["id"])
        where = f"{files['json']}: annotation {record['id']}"
        if record["id"] == 0:
            report.add("annotation id 0", where)  # pycocotools takes 0 for "not matched"
        if record["image_id"] not in images:
            fault = text_id_fault(record, images)
            if fault:
                broken(f"annotation {record['id']}: {fault}")
            else:
                report.add("box of no image", f"{where}, image_id {short(record['image_id'])}")
            continue
        image, box = images[record["image_id"]], record["bbox"]
        name = names.get(record["category_id"], "")
        shown = quoted(name) if name else f"category {short(record['category_id'])}"
        where += f" in {image['file_name']}, {shown} {_numbers(box)}"
        counts["boxes"] += 1
        report.sizes[split].append((box[2], box[3]))
        if name not in report.classes and record["category_id"] in index:
            report.unknown[name] += 1
        if record["category_id"] in index:
            counts[index[record["category_id"]]] += 1
        else:
            report.add("unknown class", where)
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        _check_box(report, where, corners, (image["width"], image["height"]), first=0)
        key = (record["category_id"], *box)
        if key in boxes[image["id"]]:
            report.add("duplicate box", where)
        boxes[image["id"]].add(key)
        outline = record.get("segmentation")
        fault = outline_fault(outline, (image["height"], image["width"]))
        if fault:
            report.add("broken outline", f"{where}: {fault}")
        elif outline and isinstance(outline, list):
            if not any(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in outline):
                report.add("unusable outline", where)
    pictures = []
    for image_id, record in images.items():
        path = os.path.join(files["images"], record["file_name"])
        pictures.append(ListedImage(path, (record["width"], record["height"])))
        if "annotations" in content and not boxes[image_id]:
            report.add("image without boxes", path)
    return pictures


def _check_box(
    report: Findings, where: str, box: Sequence[float], size: Size, first: float
) -> None:
    """Judges one box (x0, y0, x1, y1); ``first`` is the smallest valid coordinate."""
    slack = 0 if first else _COCO_SLACK
    if not all(map(math.isfinite, box)):
        report.add("box not finite", where)
    elif box[2] <= box[0] or box[3] <= box[1]:
        report.add("box without area", where)
    elif size and (
        min(box[:2]) < first - slack or box[2] > size[0] + slack or box[3] > size[1] + slack
    ):
        report.add("box outside image", f"{where} in {size[0]}x{size[1]}")


def _numbers(values: Iterable[float]) -> str:
    return f"[{', '.join(f'{v:g}' for v in values)}]"
