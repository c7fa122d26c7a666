"""COCO json files."""

import math
from collections import defaultdict
from reprlib import repr as short
from typing import Any, Dict, List, Optional, Set

from ..files import read_coco_json, read_json
from .image_files import Files, split_of
from .photos import MADE_HERE, PhotoFolder, Thing


def find(files: Files) -> List[str]:
    def is_coco(path: str) -> bool:
        try:
            content = read_coco_json(path, drop_bom=True)
        except ValueError:
            files.read(lambda path: read_json(path, drop_bom=True), path)
            return False
        return "annotations" in content and not made_here(content)

    return [path for path in files.by_suffix[".json"] if is_coco(path)]


def made_here(content: Any) -> bool:
    """Whether a json's content was written for a dataset card."""
    info = content.get("info") if isinstance(content, dict) else None
    return isinstance(info, dict) and MADE_HERE.items() <= info.items()


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    for path in found:
        content = read_coco_json(path, drop_bom=True)
        try:
            categories = _categories(content["categories"])
            images: Dict[Any, Dict[str, dict]] = defaultdict(dict)
            for image in content["images"]:
                images[image["id"]][str(image["file_name"])] = image
            objects = _objects(result, path, content["annotations"], categories, set(images))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = "annotations that can't be read, left out"
            result.tell(what, f"{path}: {type(error).__name__} {error}")
            continue
        order = sorted(categories, key=lambda key: (isinstance(key, str), key))
        names = dict.fromkeys(categories[key] for key in order if categories[key])
        result.classes += [name for name in names if name not in result.classes]
        for key, records in images.items():
            if len(records) > 1:
                where = f"{path}: id {short(key)}: {', '.join(records)}"
                result.tell("images of one id, left out", where)
                continue
            ((name, record),) = records.items()
            size = record.get("width"), record.get("height")
            good = all(isinstance(v, int) for v in size)
            result.add(
                files.matches(name, path),
                objects.get(key, ()),
                where=f"{path}: {name}",
                split=split_of(path),
                said_size=size if good else None,
            )


def _categories(records: List[dict]) -> Dict[Any, str]:
    found: Dict[Any, str] = {}
    for record in records:
        key, name = record["id"], str(record["name"]).strip()
        if found.setdefault(key, name) != name:
            raise ValueError(
                f"the categories {found[key]!r} and {name!r} have one id, {key!r}; mend it"
            )
    return found


def _objects(
    result: PhotoFolder,
    path: str,
    records: List[dict],
    categories: Dict[Any, str],
    images: Set[Any],
) -> Dict[Any, List[Optional[Thing]]]:
    """Image id -> its objects, None for those that can't be read."""
    found: Dict[Any, List[Optional[Thing]]] = defaultdict(list)
    by_text = {str(key): key for key in images}
    for record in records:
        things: List[Optional[Thing]] = []
        try:
            key = record["image_id"]
            if key not in images:
                where = f"{path}: annotation {short(record.get('id'))}: image_id {short(key)}"
                result.tell("annotation of no image, left out", where)
                if str(key) in by_text:  # "7" and 7: the image isn't one without objects
                    found[by_text[str(key)]].append(None)
                continue
            things = found[key]
            things.append(_thing(record, categories))
            where = f"{path}: annotation {short(record.get('id'))}"
            if things[-1].crowd:
                result.tell("crowd or object to ignore, not trained on nor evaluated", where)
            if _rotation(record):
                result.tell("rotated box, the upright one around it is taken", where)
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            things.append(None)
            what = "annotation that can't be read, left out"
            result.tell(what, f"{path}: {short(record)}: {type(error).__name__} {error}")
    return found


def _thing(record: dict, categories: Dict[Any, str]) -> Thing:
    x, y, w, h = (float(v) for v in record["bbox"])
    turn = math.radians(_rotation(record))
    if turn:  # about its centre
        cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
        width, height = w * cos + h * sin, w * sin + h * cos
        x, y, w, h = x + (w - width) / 2, y + (h - height) / 2, width, height
    name = categories[record["category_id"]]
    if not name:
        raise ValueError("its category has no name")
    area = record.get("area")
    return Thing(
        name,
        [x, y, w, h],
        record.get("segmentation") or None,
        int(record.get("iscrowd") or 0) or int(record.get("ignore") or 0),
        area if isinstance(area, (int, float)) else None,
    )


def _rotation(record: dict) -> float:
    """The degrees by which CVAT's box is turned; those of an outline, which is, are 0."""
    attributes = record.get("attributes")
    if not isinstance(attributes, dict) or record.get("segmentation"):
        return 0.0
    angle = attributes.get("rotation")  # or an attribute that a user has called so
    is_angle = isinstance(angle, (int, float)) and math.isfinite(angle)
    return float(angle) % 360 if is_angle and not isinstance(angle, bool) else 0.0
