"""Photos with their objects, and the files of a folder; what the readers of all layouts share."""

import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from ..mapper import SampleError, check_image
from ..outlines import is_outline, outline_fault

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case
MADE_HERE = {"description": "made by tools/prepare_data.py init"}  # not to be read again
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


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
            path: of the image; None if there is none, or more than one.
            things: its objects; their boxes may lie outside, or have no area.
            where: the annotation, for problems.
            said_size: (width, height) by the annotation.
            relative: boxes and outlines are fractions of the size.
        """
        if path is None:
            what = "annotation without an image, or with several of its name, left out"
            return self.tell(what, where)
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


class Files:
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
        file name, or without its suffix; of several the :meth:`closest`."""
        name = name.replace("\\", "/").strip()
        for base in (os.path.dirname(near), self.root):
            exact = os.path.normpath(os.path.join(base, name))
            if exact.startswith(self.root + os.sep) and os.path.isfile(exact):
                return exact
        last = name.rsplit("/", 1)[-1].lower()
        found = self._by_name.get(last) or self._by_name.get(os.path.splitext(last)[0], [])
        return self.closest(found, near)

    def closest(self, paths: Sequence[str], near: str) -> Optional[str]:
        """The one of several files of a name whose folders have the most words in common with the
        path ``near``, as train/images and train/labels have; None if that is not one alone."""
        words = [self._words(os.path.dirname(path)) & self._words(near) for path in paths]
        most = max(map(len, words), default=0)
        best = [path for path, common in zip(paths, words) if len(common) == most]
        return best[0] if len(best) == 1 else None

    def _words(self, path: str) -> Set[str]:
        words = re.findall(r"[^\W\d_]+|\d+", os.path.relpath(path, self.root).lower())
        return {SPLITS.get(word, word) for word in words}


def split_of(path: str) -> str:
    """The split that a file's or folder's name tells, such as instances_train.json; or ""."""
    for word in re.split(r"[^a-z]+", os.path.basename(path).lower()):
        if word in SPLITS:
            return SPLITS[word]
    return ""
