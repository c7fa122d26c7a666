"""Photos with their objects; what the readers of all layouts share."""

import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from ..mapper import SampleError, read_header
from ..outlines import is_drawable, is_outline, outline_fault
from .image_files import Match

MADE_HERE = {"description": "made by tools/prepare_data.py init"}  # not to be read again


@dataclass
class Thing:
    """An annotated object: class name, box, its COCO outline if it has one, and the outline's area
    if that is known."""

    name: str
    box: List[float]
    outline: Any = None
    crowd: int = 0
    area: Optional[float] = None


@dataclass
class Photo:
    """An image; ``size`` is (width, height), turned by its EXIF tag; ``split`` "" if no list names
    it."""

    path: str
    size: Tuple[int, int]
    things: List[Thing]
    split: str = ""


class _Claim(NamedTuple):
    """What one annotation says of an image; see :meth:`PhotoFolder.add`."""

    match: Match
    things: Sequence[Optional[Thing]]
    where: str
    split: str
    said_size: Optional[Tuple[int, int]]
    relative: bool

    def says(self) -> Any:
        return sorted((thing.name, thing.box) for thing in self.things if thing)


@dataclass
class PhotoFolder:
    """What a folder holds.

    Attributes:
        layout: one of `LAYOUTS`.
        photos: the annotated images, each once, by path.
        classes: in the order of the folder's own list, else of the alphabet.
        lists: the files that tell the folder's own split.
        problems: what -> where; what is left out is not among the photos.
        annotated: the images that an annotation means, or may mean.
    """

    root: str
    layout: str = ""
    photos: List[Photo] = field(default_factory=list)
    classes: List[str] = field(default_factory=list)
    lists: List[str] = field(default_factory=list)
    problems: Dict[str, List[str]] = field(default_factory=lambda: defaultdict(list))
    annotated: Set[str] = field(default_factory=set)
    _claims: Dict[str, List[_Claim]] = field(default_factory=lambda: defaultdict(list))

    def tell(self, what: str, where: str) -> None:
        """Adds a problem; paths are shown from the folder."""
        self.problems[what].append(where.replace(self.root + os.sep, ""))

    def add(
        self,
        matches: Sequence[Match],
        things: Sequence[Optional[Thing]],
        *,
        where: str,
        split: str = "",
        said_size: Optional[Tuple[int, int]] = None,
        relative: bool = False,
    ) -> None:
        """Adds an annotation; :meth:`settle` makes photos of them.

        Args:
            matches: the images that it may mean.
            things: its objects, None for one that can't be read; their boxes may lie outside, or
                have no area.
            where: the annotation, for problems.
            said_size: (width, height) by the annotation.
            relative: boxes and outlines are fractions of the size.
        """
        self.annotated |= {match.path for match in matches}
        if not matches:
            return self.tell("annotation without an image (in its split), left out", where)
        if len(matches) > 1:
            paths = ", ".join(match.path for match in matches)
            return self.tell(
                "annotation with several images of its name, left out", f"{where}: {paths}"
            )
        claim = _Claim(matches[0], things, where, split, said_size, relative)
        self._claims[matches[0].path].append(claim)

    def settle(self) -> None:
        """Makes the photos: of several annotations of an image, the closest counts."""
        for path in sorted(self._claims):
            claims = self._claims[path]
            most = max(claim.match.closeness for claim in claims)
            # One that tells the split first.
            best = sorted(
                (c for c in claims if c.match.closeness == most), key=lambda c: not c.split
            )
            if any(claim.says() != best[0].says() for claim in best):
                places = ", ".join(claim.where for claim in best)
                self.tell("image with several annotations, left out", f"{path}: {places}")
                continue
            for claim in best[1:]:
                self.tell("image annotated twice alike, the first counts", f"{path}: {claim.where}")
            for claim in claims:
                if claim.match.closeness < most:
                    where = f"{claim.where}: {path} is that of {best[0].where}"
                    self.tell("annotation whose image is that of another one, left out", where)
            self._use(best[0])

    def _use(self, claim: _Claim) -> None:
        """Adds a photo, if it can be used."""
        path, where, said_size = claim.match.path, claim.where, claim.said_size
        if claim.things and not any(claim.things):
            return self.tell("image none of whose objects can be read, left out", path)
        try:
            size, orientation = read_header(path)
        except SampleError as error:
            return self.tell("image that can't be used, left out", str(error).split("; ")[0])
        # A size that is told, and fits, is that of the turned image; but a square has no other.
        is_said = said_size and min(said_size) > 0
        tells = is_said and size[0] != size[1]
        if claim.things and (1 < orientation < 5 or orientation >= 5 and not tells):
            self.tell("image that its EXIF tag turns: are its boxes of the turned image?", path)
        if is_said and tuple(said_size) != size:
            turned = " (its EXIF tag turns it)" if said_size == size[::-1] else ""
            said = "{}x{}".format(*said_size)
            return self.tell(
                "size that isn't the image's, left out",
                f"{where}: {said}, the image is {size[0]}x{size[1]}{turned}",
            )
        good = [self._cut(thing, size, where, claim.relative) for thing in claim.things if thing]
        self.photos.append(Photo(path, size, [thing for thing in good if thing], claim.split))

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
        if outline and not fault and not is_drawable(outline):
            fault = "no polygon of three points"
        if fault:
            self.tell("outline that can't be used, left out", f"{place}: {fault}")
        box = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
        outline = None if fault else outline
        area = thing.area if outline and 0 < (thing.area or 0) <= box[2] * box[3] else None
        return Thing(thing.name, box, outline, thing.crowd, area)
