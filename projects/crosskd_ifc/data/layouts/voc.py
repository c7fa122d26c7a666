"""VOC XML files anywhere below a folder, beside their images or not."""

import os
import re
from collections import defaultdict
from typing import Any, Dict, List, Tuple

from ..files import parse_xml
from .image_files import Files
from .photos import PhotoFolder, Thing

# An image that several lists name is of the first.
_LISTS = {"train": "train", "val": "val", "test": "test", "trainval": "train"}
_MAIN = os.path.join(os.sep, "ImageSets", "Main", "")


def find(files: Files) -> List[str]:
    def start(path: str) -> bytes:
        try:
            with open(path, "rb") as f:
                found = f.read(2000)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        if not found.strip():
            raise ValueError(f"{path}: the file is empty")
        if b"<annotations>" in found:
            raise ValueError(f"{path}: CVAT's own format; export the task as COCO or Pascal VOC")
        return found

    return [
        path
        for path in files.by_suffix[".xml"]
        if b"<annotation" in (files.read(start, path) or b"")
    ]


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    splits = _own_splits(result, files, found)
    for path in found:
        try:
            tree = parse_xml(path)
            objects = list(tree.iter("object"))
            things = [_voc_thing(element) for element in objects]
        except (TypeError, ValueError) as error:
            said = str(error).replace(f"{path}: ", "")
            result.tell("annotation that can't be read, left out", f"{path}: {said}")
            continue
        for element in objects:
            if (element.findtext("difficult") or "").strip() == "1":
                what = "difficult object, trained on and evaluated as any other"
                result.tell(what, f"{path}: {element.findtext('name')}")
        name = (tree.findtext("filename") or "").strip()
        images = files.matches(name, path) if name else []
        is_clear = images and os.path.splitext(name)[0] == _stem(path)
        namesakes = [] if is_clear else files.matches(_stem(path), path)
        if len(images) == len(namesakes) == 1 and images[0].path != namesakes[0].path:
            if namesakes[0].closeness >= images[0].closeness:
                result.annotated |= {images[0].path, namesakes[0].path}
                where = f"{path}: {images[0].path}, {namesakes[0].path}"
                what = "annotation whose <filename> is another image than its own name, left out"
                result.tell(what, where)
                continue
        try:
            size = int(tree.findtext("size/width", "0")), int(tree.findtext("size/height", "0"))
        except ValueError:
            size = (0, 0)
        split = splits.get(path, "")
        result.add(images or namesakes, things, where=path, split=split, said_size=size)


def _own_splits(result: PhotoFolder, files: Files, found: List[str]) -> Dict[str, str]:
    """Annotation file -> its split by the lists in ImageSets/Main of the data set it lies in."""
    lists: Dict[str, List[Tuple[str, str]]] = defaultdict(list)  # data set -> (list, its name)
    for path in files.by_suffix[".txt"]:
        data_set, main, name = path.rpartition(_MAIN)
        if main and name[:-4] in _LISTS:
            lists[data_set].append((path, name[:-4]))
            result.lists.append(path)
    members: Dict[str, Dict[str, List[str]]] = {key: defaultdict(list) for key in lists}
    for path in found:
        around = [folder for folder in lists if path.startswith(folder + os.sep)]
        if around:
            members[max(around, key=len)][_stem(path)].append(path)
    splits: Dict[str, str] = {}
    for data_set, listed in lists.items():
        for path, name in sorted(listed, key=lambda pair: list(_LISTS).index(pair[1])):
            for line in files.lines(path):
                id_ = next((x for x in _ids_in(line) if x in members[data_set]), None)
                if id_ is None:
                    result.tell("line of a list that names no annotation", f"{path}: {line}")
                    continue
                for annotation in members[data_set][id_]:
                    splits.setdefault(annotation, _LISTS[name])
    return splits


def _ids_in(line: str) -> List[str]:
    """What an image id may be in a line, which may have a suffix, or a column of -1, 0 or 1: as it
    stands first."""
    ids = [os.path.basename(text) for text in (line, re.sub(r"\s+-?[01]$", "", line))]
    return ids + [os.path.splitext(name)[0] for name in ids]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _voc_thing(element: Any) -> Thing:
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
    if not name or None in corners:
        raise ValueError("an <object> has no <name> or <bndbox>")
    x0, y0, x1, y1 = map(float, corners)  # type: ignore[arg-type]
    # VOC counts pixels from 1, and the last one is inside; a box xmax <= xmin is empty.
    w, h = (b - a + 1 if b > a else 0 for a, b in ((x0, x1), (y0, y1)))
    return Thing(name, [x0 - 1, y0 - 1, w, h])
