"""Folders of annotated photos in the usual layouts, read into one form: VOC XML, COCO json,
YOLO text files, CSV tables.

Nothing is written, and one bad file hides no other: what can't be used becomes a problem with its
place. Boxes are (x, y, width, height) in pixels from 0, within their image.
"""

import csv
import io
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from .files import parse_xml, read_coco_json, read_text, read_voc_lines, read_yaml
from .mapper import SampleError, check_image
from .outlines import is_outline, outline_fault

__all__ = ["LAYOUTS", "MADE_HERE", "Photo", "PhotoFolder", "Thing", "read_folder"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case
MADE_HERE = {"description": "made by tools/prepare_data.py init"}  # not to be read again
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Thing:
    """An annotated object: class name, box, and its COCO outline if it has one."""

    name: str
    box: List[float]
    outline: Any = None
    crowd: int = 0


@dataclass
class Photo:
    """An image; ``size`` is (width, height), turned by its EXIF tag; ``split`` "" if no list names
    it."""

    path: str
    size: Tuple[int, int]
    things: List[Thing]
    split: str = ""


@dataclass
class PhotoFolder:
    """What a folder holds.

    Attributes:
        layout: one of `LAYOUTS`.
        photos: the annotated images, each once, by path.
        classes: in the order of the folder's own list, else of the alphabet.
        problems: what -> where; nothing of it is among the photos.
    """

    root: str
    layout: str = ""
    photos: List[Photo] = field(default_factory=list)
    classes: List[str] = field(default_factory=list)
    problems: Dict[str, List[str]] = field(default_factory=lambda: defaultdict(list))

    def tell(self, what: str, where: str) -> None:
        """Adds a problem; paths are shown from the folder."""
        self.problems[what].append(where.replace(self.root + os.sep, ""))

    def add(
        self,
        path: Optional[str],
        things: Sequence[Thing],
        *,
        where: str,
        split: str = "",
        said_size: Optional[Tuple[int, int]] = None,
        relative: bool = False,
    ) -> None:
        """Adds a photo, if it can be used.

        Args:
            path: of the image; None if there is none.
            things: its objects; their boxes may lie outside, or have no area.
            where: the annotation, for problems.
            said_size: (width, height) by the annotation.
            relative: boxes and outlines are fractions of the size.
        """
        if path is None:
            return self.tell("annotation without an image, left out", where)
        try:
            size = check_image(path)
        except SampleError as error:
            return self.tell("image that can't be used, left out", str(error).split(";")[0])
        if said_size and min(said_size) > 0 and tuple(said_size) != size:
            turned = " (its EXIF tag turns it)" if said_size == size[::-1] else ""
            said = "{}x{}".format(*said_size)
            return self.tell(
                "size that isn't the image's, left out",
                f"{where}: {said}, the image is {size[0]}x{size[1]}{turned}",
            )
        good = [self._cut(thing, size, where, relative) for thing in things]
        self.photos.append(Photo(path, size, [thing for thing in good if thing], split))

    def _cut(
        self, thing: Thing, size: Tuple[int, int], where: str, relative: bool
    ) -> Optional[Thing]:
        """The part of an object within its image, None if there is none."""
        place = f"{where}: {thing.name!r} {[round(x, 4) for x in thing.box]}"
        x, y, w, h = (v * (size[i % 2] if relative else 1) for i, v in enumerate(thing.box))
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            return self.tell("box without area, left out", place)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
        if x1 <= x0 or y1 <= y0:
            return self.tell("box outside its image, left out", place)
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 1:
            self.tell("box over the border, cut there", place)
        outline = thing.outline
        if relative and outline:
            outline = [[v * size[i % 2] for i, v in enumerate(p)] for p in outline]
        fault = outline_fault(outline, size[::-1]) if is_outline(outline) else "no outline"
        if fault:
            self.tell("outline that can't be used, left out", f"{place}: {fault}")
        box = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
        return Thing(thing.name, box, None if fault else outline, thing.crowd)


def read_folder(folder: str, layout: str = "") -> PhotoFolder:
    """Reads all photos below a folder that are annotated.

    Args:
        folder: its subfolders are looked through, but for hidden ones.
        layout: one of `LAYOUTS`; "" finds out.

    Raises:
        ValueError: it holds no annotations, those of several layouts, or no usable photo.
    """
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise ValueError(f"{folder}: there is no such folder")
    files = _Files(root)
    present = {name: found for name, (find, _) in LAYOUTS.items() for found in [find(files)]}
    fitting = [name for name, found in present.items() if found]
    if layout and not present[layout]:
        raise ValueError(f"{folder}: there are no annotations of the layout {layout!r} in it")
    if not layout and len(fitting) != 1:
        what = f"annotations of several layouts, {', '.join(fitting)}; choose with --layout"
        none = "no annotations: no VOC XML, COCO json, YOLO yaml and text files, or CSV of boxes"
        raise ValueError(f"{folder}: it holds {what if fitting else none}")
    result = PhotoFolder(root, layout or fitting[0])
    LAYOUTS[result.layout][1](result, files, present[result.layout])
    _merge_copies(result)
    if not result.photos:
        first = "".join(f"\n  {what}: {places[0]}" for what, places in result.problems.items())
        raise ValueError(f"{folder}: no photo can be used{first}")
    counts = Counter(thing.name for photo in result.photos for thing in photo.things)
    result.classes += sorted(set(counts) - set(result.classes))
    if not counts:
        raise ValueError(f"{folder}: no photo has a box that can be used")
    for name in [name for name in result.classes if not counts[name]]:
        result.tell("class without a box, in no split", repr(name))
    return result


def _merge_copies(result: PhotoFolder) -> None:
    seen: Dict[str, Photo] = {}
    for photo in result.photos:
        if photo.path in seen:
            result.tell("image annotated twice, the first counts", photo.path)
        seen.setdefault(photo.path, photo)
    result.photos = [seen[path] for path in sorted(seen)]


class _Files:
    """The files below a folder, by suffix, and the images by name."""

    def __init__(self, root: str):
        self.root = root
        self.by_suffix: Dict[str, List[str]] = defaultdict(list)
        self._by_name: Dict[str, List[str]] = defaultdict(list)
        self.images: List[str] = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                stem, suffix = os.path.splitext(name.lower())
                path = os.path.join(folder, name)
                if suffix in IMAGE_SUFFIXES:
                    self.images.append(path)
                    self._by_name[name.lower()].append(path)
                    self._by_name[stem].append(path)
                elif not name.startswith("."):
                    self.by_suffix[suffix].append(path)

    def image(self, name: str, near: str) -> Optional[str]:
        """The image that a name in the annotation file ``near`` means: with its folders, by its
        file name, or without its suffix; of several, the one closest to the annotation."""
        name = name.replace("\\", "/").strip()
        for base in (os.path.dirname(near), self.root):
            exact = os.path.normpath(os.path.join(base, name))
            if exact.startswith(self.root + os.sep) and os.path.isfile(exact):
                return exact
        last = name.rsplit("/", 1)[-1].lower()
        found = self._by_name.get(last) or self._by_name.get(os.path.splitext(last)[0])
        if not found:
            return None
        return max(found, key=lambda path: len(os.path.commonprefix([path, near])))


def _split_of(path: str) -> str:
    """The split that a file's or folder's name tells, such as instances_train.json; or ""."""
    for word in re.split(r"[^a-z]+", os.path.basename(path).lower()):
        if word in _SPLITS:
            return _SPLITS[word]
    return ""


# VOC


def _find_voc(files: _Files) -> List[str]:
    def is_annotation(path: str) -> bool:
        with open(path, "rb") as f:
            return b"<annotation" in f.read(2000)

    return [path for path in files.by_suffix[".xml"] if is_annotation(path)]


def _read_voc(result: PhotoFolder, files: _Files, found: List[str]) -> None:
    splits: Dict[str, str] = {}
    for path in files.by_suffix[".txt"]:
        folder, name = os.path.split(path)
        split = {"trainval": "train"}.get(name[:-4], name[:-4])
        if folder.endswith(os.path.join("ImageSets", "Main")) and split in ("train", "val", "test"):
            lines = read_voc_lines(os.path.dirname(os.path.dirname(folder)), name[:-4])[1]
            for line in lines:
                if line.strip() and (name != "trainval.txt" or line.split()[0] not in splits):
                    splits[line.split()[0]] = split
    for path in found:
        try:
            tree = parse_xml(path)
            things = [_voc_thing(element) for element in tree.iter("object")]
        except (TypeError, ValueError) as error:
            result.tell("annotation that can't be read, left out", f"{path}: {error}")
            continue
        stem = os.path.splitext(os.path.basename(path))[0]
        name = tree.findtext("filename") or ""
        image = files.image(name, path) if name.strip() else None
        image = image or files.image(stem, path)
        try:
            size = int(tree.findtext("size/width", "0")), int(tree.findtext("size/height", "0"))
        except ValueError:
            size = (0, 0)
        result.add(image, things, where=path, split=splits.get(stem, ""), said_size=size)


def _voc_thing(element: Any) -> Thing:
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
    if not name or None in corners:
        raise ValueError("an <object> has no <name> or <bndbox>")
    x0, y0, x1, y1 = map(float, corners)  # type: ignore[arg-type]
    # VOC counts pixels from 1, and the last one is inside; a box xmax <= xmin is empty.
    w, h = (b - a + 1 if b > a else 0 for a, b in ((x0, x1), (y0, y1)))
    return Thing(name, [x0 - 1, y0 - 1, w, h])


# COCO


def _find_coco(files: _Files) -> List[str]:
    def is_coco(path: str) -> bool:
        try:
            content = read_coco_json(path)
        except ValueError:
            return False
        return "annotations" in content and content.get("info") != MADE_HERE

    return [path for path in files.by_suffix[".json"] if is_coco(path)]


def _read_coco(result: PhotoFolder, files: _Files, found: List[str]) -> None:
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
                split=_split_of(path),
                said_size=size if good else None,
            )


# YOLO


def _find_yolo(files: _Files) -> List[str]:
    for path in (*files.by_suffix[".yaml"], *files.by_suffix[".yml"]):
        try:
            content = read_yaml(path)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("names"), (list, dict)):
            return [path]
    return [p for p in files.by_suffix[".txt"] if os.path.basename(p) == "classes.txt"][:1]


def _read_yolo(result: PhotoFolder, files: _Files, found: List[str]) -> None:
    path = found[0]
    content = {} if path.endswith(".txt") else read_yaml(path)
    names = content.get("names") or [x for x in read_text(path).splitlines() if x.strip()]
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    classes = {int(index): str(name).strip() for index, name in pairs}
    result.classes = [classes[index] for index in sorted(classes)]
    base = os.path.join(os.path.dirname(path), str(content.get("path") or ""))
    base = base if os.path.isdir(base) else os.path.dirname(path)
    members = {
        split: member
        for key, split in _SPLITS.items()
        if content.get(key)
        for member in _yolo_members(base, content[key])
    }
    labels = {p[len(result.root) :]: p for p in files.by_suffix[".txt"] if p != path}
    by_stem = {os.path.splitext(os.path.basename(p))[0]: p for p in labels.values()}
    has_yaml = bool(content)
    for image in files.images:
        stem = os.path.splitext(image)[0]
        swapped = re.sub(r"(.*)([/\\])images([/\\])", r"\1\2labels\3", stem)
        label = next((p for p in (swapped + ".txt", stem + ".txt") if os.path.isfile(p)), None)
        label = label or by_stem.get(os.path.basename(stem))
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


# CSV

_IMAGE_COLUMNS = ("filename", "file_name", "image", "image_path", "path", "file", "image_id")
_CLASS_COLUMNS = ("class", "label", "class_name", "category", "name")
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("x0", "y0", "x1", "y1"))
_WITH_SIZE = (("x", "y", "w", "h"), ("x", "y", "width", "height"))
_HEADLESS = ("path", "x1", "y1", "x2", "y2", "class")  # of keras-retinanet


def _read_table(path: str) -> Optional[Tuple[List[Dict[str, str]], Dict[str, Any]]]:
    """Rows of a CSV of boxes, and which columns hold what; None if it is none."""
    try:
        text = read_text(path).lstrip("\ufeff")
    except ValueError:
        return None
    first = text.split("\n", 1)[0]
    delimiter = next((d for d in ",;\t" if d in first), ",")
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    if not rows:
        return None
    header = [name.strip().lower() for name in rows[0]]
    if len(header) == 6 and _is_number(header[1]) and os.path.splitext(header[0])[1]:
        header, body = list(_HEADLESS), rows
    else:
        body = rows[1:]
    columns: Dict[str, Any] = {
        "image": next((c for c in _IMAGE_COLUMNS if c in header), None),
        "class": next((c for c in _CLASS_COLUMNS if c in header), None),
        "corners": next((c for c in _CORNERS if set(c) <= set(header)), None),
        "sized": next((c for c in _WITH_SIZE if set(c) <= set(header)), None),
    }
    if not columns["image"] or not columns["class"]:
        return None
    if not columns["corners"] and not columns["sized"]:
        return None
    return [dict(zip(header, (cell.strip() for cell in row))) for row in body], columns


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*-?[0-9.]+\s*|", text) is not None


def _find_csv(files: _Files) -> List[str]:
    return [path for path in files.by_suffix[".csv"] if _read_table(path)]


def _read_csv(result: PhotoFolder, files: _Files, found: List[str]) -> None:
    annotated = set()
    for path in found:
        rows, columns = _read_table(path) or ([], {})
        objects: Dict[str, List[Thing]] = defaultdict(list)
        splits: Dict[str, str] = {}
        for number, row in enumerate(rows, 1):
            name = row.get(columns["image"], "")
            splits[name] = _SPLITS.get(row.get("split", "").lower(), _split_of(path))
            things = objects[name]  # a row without a box: an image without one
            keys = columns["corners"] or columns["sized"]
            cells = [row.get(key, "") for key in keys]
            if not any(cells):
                continue
            try:
                x, y, w, h = map(float, cells)
                w, h = (w - x, h - y) if columns["corners"] else (w, h)
                if not row.get(columns["class"]):
                    raise ValueError("no class")
                things.append(Thing(row[columns["class"]], [x, y, w, h]))
            except ValueError as error:
                where = f"{path} row {number}: {error}"
                result.tell("line that can't be read, left out", where)
        for name, things in objects.items():
            image = files.image(name, path)
            annotated.add(image)
            result.add(image, things, where=f"{path}: {name!r}", split=splits[name])
    for image in files.images:
        if image not in annotated:
            result.tell("image without an annotation, left out", image)


# name -> (its annotation files, the reader)
LAYOUTS: Dict[str, Tuple[Callable, Callable]] = {
    "voc": (_find_voc, _read_voc),
    "coco": (_find_coco, _read_coco),
    "yolo": (_find_yolo, _read_yolo),
    "csv": (_find_csv, _read_csv),
}
