"""The checks of annotations: VOC files and COCO json. A part of `check`.

Box shorthand: boxes are compared as they stand in the files, in pixels. In VOC files pixels count
from 1 and the last one is inside the box, so that 1 <= xmin < xmax <= width; in COCO files a box is
(x, y, width, height) from 0.
"""

import itertools
import math
import os
from collections import Counter
from reprlib import repr as short
from typing import (
    Any,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from detectron2.utils.file_io import PathManager

from .fields import (
    ANNOTATION_FIELDS,
    CATEGORY_FIELDS,
    IMAGE_FIELDS,
    text_id_fault,
    voc_evaluator_fault,
    voc_list_fault,
)
from .files import read_coco_json, read_voc_annotation, read_voc_split
from .findings import Findings, quoted
from .outlines import outline_fault

__all__ = ["ListedImage", "check_coco", "check_voc"]

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
        if valid("category", record, CATEGORY_FIELDS) and unique("category", record["id"], names):
            unique("category name", record["name"], names.values())
            names[record["id"]] = record["name"]
    index = {category: i for i, category in enumerate(sorted(names))}
    classes = tuple(names[category] for category in index)
    report.classes = report.classes or classes
    if not classes:
        broken("no categories")
    elif classes != report.classes:
        report.in_file = report.in_file or (classes if report.card.classes else ())
        pairs = enumerate(itertools.zip_longest(classes, report.classes))
        number, (here, there) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        report.add(
            "different classes", f"{files['json']}: class {number} is {here!r}, expected {there!r}"
        )

    images: Dict[Any, dict] = {}
    for record in content["images"]:
        if valid("image", record, IMAGE_FIELDS) and unique("image", record["id"], images):
            images[record["id"]] = record
    if len(set(map(type, images))) > 1:
        broken("image ids are numbers and strings")  # detectron2 sorts them
    boxes: Dict[Any, set] = {image: set() for image in images}
    seen: set = set()
    for record in content.get("annotations", []):
        if not valid("annotation", record, ANNOTATION_FIELDS):
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
