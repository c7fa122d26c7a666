"""YOLO: a text file for each image, with the class names in a yaml or in classes.txt."""

import math
import os
import re
from reprlib import repr as short
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from ..files import read_text, read_yaml
from .image_files import SPLITS, Files, Match, common_tail, path_parts, splits_in
from .photos import PhotoFolder, Thing


def find(files: Files) -> List[str]:
    def has_names(path: str) -> bool:
        content = files.read(read_yaml, path)
        return isinstance(content, dict) and isinstance(content.get("names"), (list, dict))

    yamls = [p for p in (*files.by_suffix[".yaml"], *files.by_suffix[".yml"]) if has_names(p)]
    best = [path for path in yamls if os.path.basename(path) in ("data.yaml", "data.yml")]
    lists = [path for path in files.by_suffix[".txt"] if os.path.basename(path) == "classes.txt"]
    return best or yamls + lists


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    classes = _class_names(found[0])
    for path in found[1:]:
        if _class_names(path) != classes:
            raise ValueError(
                f"{found[0]} and {path} hold different class names; make one card of each data "
                "set, or call the right one data.yaml and remove the others"
            )
    result.classes = [classes[index] for index in sorted(classes)]
    yamls = {path: read_yaml(path) for path in found if not path.endswith(".txt")}
    keypoints = {_keypoint_numbers(content.get("kpt_shape")) for content in yamls.values()}
    splits: Dict[str, str] = {}
    for path, content in yamls.items():
        for image, split in _own_splits(result, files, path, content):
            if splits.setdefault(image, split) != split:
                what = "photo in two splits of a yaml; it is in the first"
                result.tell(what, f"{path}: {image}")
    for path in files.by_suffix[".txt"]:
        images = _images_of(path, files)
        if path not in found and (images or _looks_like_labels(path)):
            things = _things(result, path, classes, keypoints)
            split = splits.get(images[0].path, "") if images else ""
            result.add(images, things, where=path, split=split, relative=True)
    # What a yaml lists may be without objects, and then has no text file.
    for image in [image for image in splits if image not in result.annotated]:
        match = Match(image, (True, 0, 0, 0))
        result.add([match], [], where=image, split=splits[image])


def _looks_like_labels(path: str) -> bool:
    try:
        return re.match(r"\d+(\s+[\d.eE+-]+){4}", read_text(path, drop_bom=True)) is not None
    except ValueError:
        return False


def _things(
    result: PhotoFolder, path: str, classes: Dict[int, str], keypoints: Set[int]
) -> List[Optional[Thing]]:
    """The objects in a text file, None for those that can't be read."""
    try:
        lines = read_text(path, drop_bom=True).splitlines()
    except ValueError as error:
        result.tell("annotation that can't be read, left out", str(error))
        return [None]
    things: List[Optional[Thing]] = []
    for number, line in enumerate(lines, 1):
        try:
            things += [_yolo_thing(line.split(), classes, keypoints)] if line.strip() else []
        except (KeyError, ValueError) as error:
            things.append(None)
            where = f"{path} line {number}: {error}"
            result.tell("line that can't be read, left out", where)
    return things


def _class_names(path: str) -> Dict[int, str]:
    """Number -> name."""
    if path.endswith(".txt"):
        names: Any = read_text(path, drop_bom=True).splitlines()
    else:
        names = read_yaml(path)["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    for name in names.values() if isinstance(names, dict) else names:
        if isinstance(name, bool) or name is None:  # what YAML makes of no, yes, on, off and null
            raise ValueError(f"{path}: the class name {name} has to be in quotes, such as 'no'")
    try:
        # An empty line has a number, too.
        found = {int(index): str(name).strip() for index, name in pairs if str(name).strip()}
    except (OverflowError, TypeError, ValueError):
        said = short(names)
        raise ValueError(
            f"{path}: names is {said}; expected a list of names, or number: name"
        ) from None
    if not found:
        raise ValueError(f"{path}: there is no class name in it")
    for name in found.values():
        if [*found.values()].count(name) > 1:
            raise ValueError(f"{path}: the class {name!r} is there twice; give each its own name")
    return found


def _keypoint_numbers(shape: Any) -> int:
    """How many numbers of keypoints follow a box, by a yaml's kpt_shape."""
    good = isinstance(shape, list) and all(isinstance(n, int) for n in shape)
    return math.prod(shape) if good else 0


def _images_of(path: str, files: Files) -> List[Match]:
    """The images that a text file may be of: in the folder images for one in labels, or beside it,
    or of its name in the closest folder."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    parts = os.path.relpath(folder, files.root).split(os.sep)
    if "labels" in parts:
        last = len(parts) - 1 - parts[::-1].index("labels")
        swapped = os.path.join(files.root, *parts[:last], "images", *parts[last + 1 :])
        name = os.path.join(os.path.relpath(swapped, folder), name)
    return files.matches(name, path)


def _own_splits(
    result: PhotoFolder, files: Files, path: str, content: Dict[str, Any]
) -> Iterator[Tuple[str, str]]:
    """Images and their splits, by the entries train, val and test of a yaml."""
    base = os.path.join(os.path.dirname(path), str(content.get("path") or ""))
    base = base if os.path.isdir(base) else os.path.dirname(path)
    result.lists += [path] if any(content.get(key) for key in SPLITS) else []
    for key, split in SPLITS.items():
        entries = content.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, str):
                said = f"{key} is {short(entry)}; expected a folder, or a text file with a list"
                raise ValueError(f"{path}: {said}")
            images = [
                image
                for place in _places(files, base, entry, split)
                for image in _members(result, files, place)
            ]
            if not images:
                result.tell("entry of a yaml that matches no image", f"{path}: {key}: {entry}")
            yield from ((image, split) for image in images)


def _places(files: Files, base: str, entry: str, split: str) -> List[str]:
    """The folders or lists that an entry of a yaml means."""
    # Many files say ../train/images for a folder beside them.
    for name in (entry, re.sub(r"^(\.\./)+", "", entry)):
        place = os.path.normpath(os.path.join(base, name))
        if os.path.exists(place) and (place + os.sep).startswith(files.root + os.sep):
            return [place]
    # A path of another machine: the longest end of it that is here, with its word of the split.
    places = {*files.by_suffix[".txt"], *map(os.path.dirname, files.images)}
    for place in [*places]:
        while len(place := os.path.dirname(place)) > len(files.root):
            places.add(place)
    written = path_parts(entry)
    ends = {place: common_tail(files.parts(place), written) for place in places}
    most = max(ends.values(), default=0)
    lost = split in splits_in(written) and split not in splits_in(written[len(written) - most :])
    longest = [place for place, count in ends.items() if count == most and not lost]
    return [place for place in longest if most and splits_in(files.parts(place)) <= {split}]


def _members(result: PhotoFolder, files: Files, place: str) -> Iterator[str]:
    """The images in a folder, or those that a text file lists."""
    if not place.endswith(".txt"):
        yield from (path for path in files.images if path.startswith(place + os.sep))
        return
    for line in files.lines(place):
        images = files.matches(line, place)
        if len(images) == 1:
            yield images[0].path
        else:
            result.tell("line of a list that names no image, or several", f"{place}: {line}")


def _yolo_thing(words: List[str], classes: Dict[int, str], keypoints: Set[int]) -> Thing:
    index, values = int(words[0]), [float(word) for word in words[1:]]
    if index not in classes:
        raise ValueError(f"class {index} is none of 0 to {max(classes, default=-1)}")
    if len(values) - 4 in {0, *keypoints}:
        x, y, w, h = values[:4]
        return Thing(classes[index], [x - w / 2, y - h / 2, w, h])
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers; expected 4 of a box, or the pairs of a polygon")
    xs, ys = values[0::2], values[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return Thing(classes[index], box, [values])
