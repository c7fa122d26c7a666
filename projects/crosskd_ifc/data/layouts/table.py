"""CSV files with a row for each box."""

import contextlib
import csv
import io
import os
import re
from collections import defaultdict
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from ..files import read_text
from .photos import SPLITS, Files, PhotoFolder, Thing, split_of

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


def _numbers(rows: List[Dict[str, str]], keys: Sequence[str]) -> Iterator[float]:
    for row in rows:
        for key in keys:
            with contextlib.suppress(ValueError):
                yield float(row.get(key, ""))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*-?[0-9.]+\s*|", text) is not None


def find(files: Files) -> List[str]:
    return [path for path in files.by_suffix[".csv"] if _read_table(path)]


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    annotated = set()
    for path in found:
        rows, columns = _read_table(path) or ([], {})
        keys = columns.get("corners") or columns.get("sized") or ()
        # Beyond pixels 0 and 1 nothing would be a box.
        is_relative = max(_numbers(rows, keys), default=2) < 2
        objects: Dict[str, List[Thing]] = defaultdict(list)
        splits: Dict[str, str] = {}
        for number, row in enumerate(rows, 1):
            name = row.get(columns["image"], "")
            splits[name] = SPLITS.get(row.get("split", "").lower(), split_of(path))
            things = objects[name]  # a row without a box: an image without one
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
            place = f"{path}: {name!r}"
            result.add(image, things, where=place, split=splits[name], relative=is_relative)
    for image in files.images:
        if image not in annotated:
            result.tell("image without an annotation, left out", image)
