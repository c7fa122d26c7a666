"""The checks of annotations: VOC files and COCO json. A part of `check`.

Box shorthand: boxes are compared as they stand in the files, in pixels. In VOC files pixels count
from 1 and the last one is inside the box, so that 1 <= xmin < xmax <= width; in COCO files a box is
(x, y, width, height) from 0.
"""

import math
import os
from collections import Counter
from reprlib import repr as short
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from detectron2.utils.file_io import PathManager

from .class_names import first_difference
from .fields import (
    ANNOTATION_FIELDS,
    CATEGORY_FIELDS,
    IMAGE_FIELDS,
    text_id_fault,
    voc_evaluator_fault,
    voc_list_fault,
)
from .files import read_coco_json, read_voc_annotation, read_voc_split
from .findings import COUNTED, Findings, quoted
from .outlines import is_drawable, outline_fault

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
        _check_number(report, path, len(objects))
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


class _CocoRecords:
    """Looks at the records of one COCO file, and tells what is wrong with them."""

    def __init__(self, report: Findings, path: str):
        self._report, self._path = report, path

    def tell(self, kind: str, what: str) -> None:
        self._report.add(kind, f"{self._path}: {what}")

    def is_valid(self, kind: str, record: Any, fields: Mapping[str, Callable]) -> bool:
        """Whether a record has these fields, each as its test wants it."""
        record = record if isinstance(record, dict) else {}
        bad = [key for key, test in fields.items() if not test(record.get(key))]
        if bad:
            named = f"{short(record['id'])}: " if "id" in record else ""
            what = f"{kind} {named}{short(record)}, missing or wrong: {', '.join(bad)}"
            self.tell("broken record", what)
        return not bad

    def is_new(self, kind: str, key: Any, seen: Container) -> bool:
        if key in seen:
            self.tell("duplicate id", f"{kind} {short(key)}")
        return key not in seen


def check_coco(report: Findings, split: str) -> List[ListedImage]:
    """Does for a COCO json file what `check_voc` does for a VOC split."""
    files = report.card.splits[split]
    try:
        content = read_coco_json(files["json"])
    except ValueError as error:
        report.add("unreadable split", str(error))
        return []
    records = _CocoRecords(report, files["json"])
    names = _check_categories(report, records, content["categories"])
    images = _check_images(records, content["images"])
    boxes = _check_annotations(report, split, content.get("annotations", []), names, images)
    pictures = []
    for image_id, record in images.items():
        path = os.path.join(files["images"], record["file_name"])
        pictures.append(ListedImage(path, (record["width"], record["height"])))
        if "annotations" in content and not boxes[image_id]:
            report.add("image without boxes", path)
        _check_number(report, path, len(boxes[image_id]))
    return pictures


def _check_number(report: Findings, path: str, objects: int) -> None:
    if objects > COUNTED:
        report.add("more than 100 objects", f"{path}: {objects}")


def _check_categories(report: Findings, records: _CocoRecords, categories: list) -> Dict[Any, str]:
    """Returns category id -> name, in the order of the ids, which is that of the classes."""
    names: Dict[Any, str] = {}
    for record in categories:
        if not records.is_valid("category", record, CATEGORY_FIELDS):
            continue
        if records.is_new("category", record["id"], names):
            records.is_new("category name", record["name"], names.values())
            names[record["id"]] = record["name"]
    names = {category: names[category] for category in sorted(names)}
    classes = tuple(names.values())
    report.classes = report.classes or classes
    if not classes:
        records.tell("broken record", "no categories")
    elif classes != report.classes:
        report.in_file = report.in_file or (classes if report.card.classes else ())
        number, here, there = first_difference(classes, report.classes)
        records.tell("different classes", f"class {number} is {here!r}, expected {there!r}")
    return names


def _check_images(records: _CocoRecords, images: list) -> Dict[Any, dict]:
    """Returns image id -> record, of those that can be used."""
    found: Dict[Any, dict] = {}
    for record in images:
        if records.is_valid("image", record, IMAGE_FIELDS):
            if records.is_new("image", record["id"], found):
                found[record["id"]] = record
    if len(set(map(type, found))) > 1:
        records.tell("broken record", "image ids are numbers and strings")  # detectron2 sorts them
    return found


def _check_annotations(
    report: Findings, split: str, annotations: list, names: Dict[Any, str], images: Dict[Any, dict]
) -> Dict[Any, set]:
    """Returns image id -> its boxes, less crowds; counts them in ``report``."""
    counts, path = report.counts[split], report.card.splits[split]["json"]
    records = _CocoRecords(report, path)
    index = {category: i for i, category in enumerate(names)}
    boxes: Dict[Any, set] = {image: set() for image in images}
    seen: set = set()
    for record in annotations:
        if not records.is_valid("annotation", record, ANNOTATION_FIELDS):
            continue
        records.is_new("annotation", record["id"], seen)
        seen.add(record["id"])
        where = f"{path}: annotation {record['id']}"
        if record["id"] == 0:
            report.add("annotation id 0", where)  # pycocotools takes 0 for "not matched"
        if record["image_id"] not in images:
            fault = text_id_fault(record, images)
            if fault:
                records.tell("broken record", f"annotation {record['id']}: {fault}")
            else:
                report.add("box of no image", f"{where}, image_id {short(record['image_id'])}")
            continue
        image, category, box = images[record["image_id"]], record["category_id"], record["bbox"]
        shown = quoted(names[category]) if category in names else f"category {short(category)}"
        where += f" in {image['file_name']}, {shown} {_numbers(box)}"
        counted = not record["iscrowd"]
        if counted:
            counts["boxes"] += 1
            report.sizes[split].append((box[2], box[3]))
        else:
            report.add("crowd", where)
        if category in names:
            counts[index[category]] += counted
            if names[category] not in report.classes:
                report.unknown[names[category]] += 1
        else:
            report.add("unknown class", where)
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        _check_box(report, where, corners, (image["width"], image["height"]), first=0)
        if (category, *box) in boxes[image["id"]]:
            report.add("duplicate box", where)
        if counted:
            boxes[image["id"]].add((category, *box))
        _check_outline(report, where, record.get("segmentation"), image)
    return boxes


def _check_outline(report: Findings, where: str, outline: Any, image: dict) -> None:
    fault = outline_fault(outline, (image["height"], image["width"]))
    if fault:
        report.add("broken outline", f"{where}: {fault}")
    elif outline and not is_drawable(outline):
        report.add("unusable outline", where)


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
