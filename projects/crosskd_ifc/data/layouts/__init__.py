"""Folders of annotated photos in the usual layouts, read into one form: VOC XML, COCO json,
YOLO text files, CSV tables.

Nothing is written, and one bad file hides no other: what can't be used becomes a problem with its
place. Boxes are (x, y, width, height) in pixels from 0, within their image.
"""

import os
from collections import Counter
from typing import Callable, Dict, Tuple

from . import coco, table, voc, yolo
from .coco import made_here
from .image_files import IMAGE_SUFFIXES, SPLITS, Files
from .photos import MADE_HERE, Photo, PhotoFolder, Thing

__all__ = ["LAYOUTS", "MADE_HERE", "Photo", "PhotoFolder", "Thing", "made_here", "read_folder"]

# name -> (its annotation files, the reader)
LAYOUTS: Dict[str, Tuple[Callable, Callable]] = {
    "voc": (voc.find, voc.read),
    "coco": (coco.find, coco.read),
    "yolo": (yolo.find, yolo.read),
    "csv": (table.find, table.read),
}


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
    files = Files(root)
    present = {name: found for name, (find, _) in LAYOUTS.items() for found in [find(files)]}
    fitting = [name for name, found in present.items() if found]
    if layout and not present[layout]:
        raise ValueError(f"{folder}: there are no annotations of the layout {layout!r} in it")
    if not layout and len(fitting) != 1:
        what = f"annotations of several layouts, {', '.join(fitting)}; choose with --layout"
        none = "no annotations: no VOC XML, COCO json, YOLO yaml and text files, or CSV of boxes"
        none += "".join(f"\n  file that can't be read: {x}" for x in files.unreadable.values())
        none += table.explain(files)
        raise ValueError(f"{folder}: it holds {what if fitting else none}")
    if not files.images:
        raise ValueError(f"{folder}: no image in it is one of {', '.join(IMAGE_SUFFIXES)}")
    result = PhotoFolder(root, layout or fitting[0])
    LAYOUTS[result.layout][1](result, files, present[result.layout])
    result.settle()
    for error in files.unreadable.values():
        result.tell("file that can't be read, left out", error)
    for image in files.images:
        if image not in result.annotated:
            result.tell("image without an annotation, left out", image)
    first = "".join(f"\n  {what}: {places[0]}" for what, places in result.problems.items())
    if not result.photos:
        raise ValueError(f"{folder}: no photo can be used{first}")
    counts = Counter(thing.name for photo in result.photos for thing in photo.things)
    result.classes += sorted(set(counts) - set(result.classes))
    if not counts:
        raise ValueError(f"{folder}: no photo has a box that can be used{first}")
    for name in [name for name in result.classes if not counts[name]]:
        result.tell("class without a box, in no split", repr(name))
    _split_by_folders(result, files)
    return result


def _split_by_folders(result: PhotoFolder, files: Files) -> None:
    """Where no list tells a split, folders of these names are one, if all photos lie in them."""
    if any(photo.split for photo in result.photos):
        return
    found = [{SPLITS.get(x) for x in files.parts(photo.path)} - {None} for photo in result.photos]
    if all(len(names) == 1 for names in found) and len(set().union(*found)) > 1:
        for photo, names in zip(result.photos, found):
            photo.split = str(*names)
