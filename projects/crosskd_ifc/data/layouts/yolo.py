"""YOLO: a text file for each image, with the class names in a yaml or in classes.txt."""

import os
import re
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, List, Set, Tuple

from ..files import read_text, read_yaml
from .photos import SPLITS, Files, PhotoFolder, Thing


def find(files: Files) -> List[str]:
    for path in (*files.by_suffix[".yaml"], *files.by_suffix[".yml"]):
        try:
            content = read_yaml(path)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("names"), (list, dict)):
            return [path]
    return [p for p in files.by_suffix[".txt"] if os.path.basename(p) == "classes.txt"][:1]


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    path = found[0]
    content = {} if path.endswith(".txt") else read_yaml(path)
    names = content.get("names") or read_text(path).splitlines()
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    # An empty line has a number, too.
    classes = {int(index): str(name).strip() for index, name in pairs if str(name).strip()}
    result.classes = [classes[index] for index in sorted(classes)]
    base = os.path.join(os.path.dirname(path), str(content.get("path") or ""))
    base = base if os.path.isdir(base) else os.path.dirname(path)
    members = {
        split: member
        for key, split in SPLITS.items()
        if content.get(key)
        for member in _yolo_members(base, content[key])
    }
    labels, unclear = _labels(files, path)
    has_yaml = bool(content)
    for image in files.images:
        label = labels.get(image)
        if image in unclear:
            result.tell("image with several text files of its name, left out", image)
            continue
        split = next((s for s, test in members.items() if test(image)), "")
        if label is None and not (has_yaml and split):
            result.tell("image without an annotation, left out", image)
            continue
        things = []
        lines = read_text(label).splitlines() if label else []
        for number, line in enumerate(lines, 1):
            try:
                things += [_yolo_thing(line.split(), classes)] if line.strip() else []
            except (KeyError, ValueError) as error:
                where = f"{label} line {number}: {error}"
                result.tell("line that can't be read, left out", where)
        result.add(image, things, where=label or image, split=split, relative=True)


def _labels(files: Files, names: str) -> Tuple[Dict[str, str], Set[str]]:
    """Image -> its text file: at its place in the folder labels, beside it, or of its name in the
    closest folder, if no other image has that one. And the images that may have several."""
    found: Dict[str, str] = {}
    unclear = set()
    for image in files.images:
        stem = os.path.splitext(image)[0]
        swapped = re.sub(r"(.*)([/\\])images([/\\])", r"\1\2labels\3", stem)
        exact = [p for p in (swapped + ".txt", stem + ".txt") if os.path.isfile(p)]
        found.update({image: exact[0]} if exact else {})
    images, texts = defaultdict(list), defaultdict(list)
    for path in set(files.images) - set(found):
        images[_stem(path)].append(path)
    for path in set(files.by_suffix[".txt"]) - {names, *found.values()}:
        texts[_stem(path)].append(path)
    for stem, paths in images.items():
        for image in paths:
            label = files.closest(texts[stem], image)
            if label and files.closest(paths, label) == image:
                found[image] = label
        left = set(texts[stem]) - set(found.values())
        unclear |= set(paths) - set(found) if left else set()
    return found, unclear


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _yolo_members(base: str, entry: Any) -> Iterable[Callable[[str], bool]]:
    """Tests of whether an image belongs to an entry train, val or test of the yaml."""
    folders, listed = [], set()
    for item in entry if isinstance(entry, list) else [entry]:
        # Many files say ../train/images for a folder beside them.
        places = [os.path.join(base, str(item)), os.path.join(base, re.sub(r"^(\.\./)+", "", item))]
        place = next((os.path.realpath(p) for p in places if os.path.exists(p)), None)
        if place and place.endswith(".txt"):
            lines = [x.strip() for x in read_text(place).splitlines() if x.strip()]
            starts = (base, os.path.dirname(place))
            listed |= {os.path.realpath(os.path.join(s, x)) for x in lines for s in starts}
        elif place:
            folders.append(place + os.sep)
    yield lambda image: image in listed or image.startswith(tuple(folders))


def _yolo_thing(words: List[str], classes: Dict[int, str]) -> Thing:
    index, values = int(words[0]), [float(word) for word in words[1:]]
    if index not in classes:
        raise ValueError(f"class {index} is none of 0 to {max(classes, default=-1)}")
    if len(values) == 4:
        x, y, w, h = values
        return Thing(classes[index], [x - w / 2, y - h / 2, w, h])
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers; expected 4 of a box, or the pairs of a polygon")
    xs, ys = values[0::2], values[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return Thing(classes[index], box, [values])
