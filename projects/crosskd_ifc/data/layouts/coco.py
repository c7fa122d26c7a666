"""COCO json files."""

from collections import defaultdict
from reprlib import repr as short
from typing import List

from ..files import read_coco_json
from .photos import MADE_HERE, Files, PhotoFolder, Thing, split_of


def find(files: Files) -> List[str]:
    def is_coco(path: str) -> bool:
        try:
            content = read_coco_json(path)
        except ValueError:
            return False
        return "annotations" in content and content.get("info") != MADE_HERE

    return [path for path in files.by_suffix[".json"] if is_coco(path)]


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    for path in found:
        content = read_coco_json(path)
        try:
            categories = {c["id"]: str(c["name"]) for c in content["categories"]}
            objects = defaultdict(list)
            for record in content["annotations"]:
                try:
                    box = [float(v) for v in record["bbox"]]
                    name = categories[record["category_id"]]
                    outline, crowd = record.get("segmentation"), int(record.get("iscrowd") or 0)
                    things = objects[record["image_id"]]
                    things.append(Thing(name, [*box[:3], box[3]], outline or None, crowd))
                except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                    what = "annotation that can't be read, left out"
                    result.tell(what, f"{path}: {short(record)}: {type(error).__name__} {error}")
            images = [(i["id"], str(i["file_name"]), i) for i in content["images"]]
        except (AttributeError, KeyError, TypeError) as error:
            what = "annotations that can't be read, left out"
            result.tell(what, f"{path}: {type(error).__name__} {error}")
            continue
        result.classes += [
            categories[key]
            for key in sorted(categories, key=lambda key: (isinstance(key, str), key))
            if categories[key] not in result.classes
        ]
        for key, name, record in images:
            size = record.get("width"), record.get("height")
            good = all(isinstance(v, int) for v in size)
            result.add(
                files.image(name, path),
                objects.get(key, ()),
                where=f"{path}: {name}",
                split=split_of(path),
                said_size=size if good else None,
            )
