"""VOC XML files anywhere below a folder, beside their images or not."""

import os
from typing import Any, Dict, List

from ..files import parse_xml, read_voc_lines
from .photos import Files, PhotoFolder, Thing


def find(files: Files) -> List[str]:
    def is_annotation(path: str) -> bool:
        with open(path, "rb") as f:
            return b"<annotation" in f.read(2000)

    return [path for path in files.by_suffix[".xml"] if is_annotation(path)]


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
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
