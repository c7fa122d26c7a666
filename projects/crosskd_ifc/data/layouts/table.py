"""CSV files with a row for each box."""

import csv
import io
import math
import os
import re
from collections import Counter, defaultdict
from reprlib import repr as short
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..files import read_text
from .image_files import SPLITS, Files, split_of
from .photos import PhotoFolder, Thing

_IMAGE_COLUMNS = ("filename", "file_name", "image", "image_path", "path", "file", "image_id")
_CLASS_COLUMNS = ("class", "label", "class_name", "category", "name")
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("x0", "y0", "x1", "y1"))
_WITH_SIZE = (("x", "y", "w", "h"), ("x", "y", "width", "height"))
_HEADLESS = ("path", "x1", "y1", "x2", "y2", "class")  # of keras-retinanet


def _read_table(path: str) -> Optional[Tuple[List[Dict[str, str]], Dict[str, Any]]]:
    """Rows of a CSV of boxes, and which columns hold what; None if it is none.

    Raises:
        ValueError: it can't be read.
    """
    text = io.StringIO(read_text(path, drop_bom=True), newline=None).read()  # ends lines by \n
    first, _, others = text.partition("\n")
    said = re.fullmatch("sep=(.)", first.strip())  # Excel's
    text = others if said else text
    delimiter = said[1] if said else next((d for d in ",;\t" if d in first), ",")
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: the file is empty")
    header = [name.strip().lower() for name in rows[0]]
    if len(header) == 6 and _is_number(header[1]) and os.path.splitext(header[0])[1]:
        header, body = list(_HEADLESS), rows
    else:
        body = rows[1:]
    corners = _CORNERS[:1] if "x3" in header else _CORNERS  # two of four corners are no box
    columns: Dict[str, Any] = {
        "image": next((c for c in _IMAGE_COLUMNS if c in header), None),
        "class": next((c for c in _CLASS_COLUMNS if c in header), None),
        "corners": next((c for c in corners if set(c) <= set(header)), None),
        "sized": next((c for c in _WITH_SIZE if set(c) <= set(header)), None),
    }
    if not columns["image"] or not columns["class"]:
        return None
    if not columns["corners"] and not columns["sized"]:
        return None
    return [dict(zip(header, (cell.strip() for cell in row))) for row in body], columns


def _holds_fractions(cells: Sequence[str]) -> Optional[bool]:
    """Whether a row's box is in fractions of the image; None for one that isn't four numbers.

    Between pixels 0 and 2 nothing would be a box.
    """
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    return max(values) < 2 if all(map(math.isfinite, values)) else None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*-?[0-9.]+\s*|", text) is not None


def explain(files: Files) -> str:
    """Lines on the tables that aren't read, for the error that nothing is."""
    expected = f"one of {', '.join(_IMAGE_COLUMNS)}; one of {', '.join(_CLASS_COLUMNS)}; and four "
    expected += f"such as {', '.join(_CORNERS[0])} or {', '.join(_WITH_SIZE[1])}"
    lines = []
    for path in files.by_suffix[".csv"]:
        first = next(iter(files.lines(path)), "")
        lines.append(f"\n  {path}: its columns are {short(first)}; expected {expected}")
    return "".join(lines)


def find(files: Files) -> List[str]:
    return [path for path in files.by_suffix[".csv"] if files.read(_read_table, path)]


def read(result: PhotoFolder, files: Files, found: List[str]) -> None:
    for path in found:
        rows, columns = _read_table(path) or ([], {})
        keys = columns.get("corners") or columns.get("sized") or ()
        kinds = Counter(_holds_fractions([row.get(key, "") for key in keys]) for row in rows)
        is_relative = kinds[True] > kinds[False]
        objects: Dict[str, List[Optional[Thing]]] = defaultdict(list)
        splits: Dict[str, str] = {}
        sizes: Dict[str, Optional[Tuple[int, int]]] = {}
        for number, row in enumerate(rows, 1):
            name = row.get(columns["image"], "")
            said = row.get("split", "").lower()
            if said in SPLITS and splits.setdefault(name, SPLITS[said]) != SPLITS[said]:
                what = "rows of one photo in two splits; it is in the first"
                result.tell(what, f"{path} row {number}: {name}")
            if said and said not in SPLITS:
                where = f"{path} row {number}: {said!r}"
                result.tell("split other than train, val and test, not used", where)
            sizes[name] = None if "width" in keys else _size(row)
            things = objects[name]  # a row without a box: an image without one
            cells = [row.get(key, "") for key in keys]
            if not any(cells):
                continue
            try:
                x, y, w, h = map(float, cells)
                w, h = (w - x, h - y) if columns["corners"] else (w, h)
                if not row.get(columns["class"]):
                    raise ValueError("no class")
                if _holds_fractions(cells) is (not is_relative):
                    kind = "pixels among fractions" if is_relative else "fractions among pixels"
                    raise ValueError(f"{kind}: {', '.join(cells)}")
                things.append(Thing(row[columns["class"]], [x, y, w, h]))
            except ValueError as error:
                things.append(None)
                where = f"{path} row {number}: {error}"
                result.tell("line that can't be read, left out", where)
        for name, things in objects.items():
            result.add(
                files.matches(name, path),
                things,
                where=f"{path}: {name!r}",
                split=splits.get(name) or split_of(path),
                said_size=sizes[name],
                relative=is_relative,
            )


def _size(row: Dict[str, str]) -> Optional[Tuple[int, int]]:
    """(width, height) of the image, if a row tells it."""
    try:
        return int(float(row["width"])), int(float(row["height"]))
    except (KeyError, OverflowError, ValueError):
        return None
