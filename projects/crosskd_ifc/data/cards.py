"""Dataset cards: a custom data set as one small YAML file, and the dropping of boxes without area.

A card names a VOC folder or COCO json files; `register_card` adds its splits to detectron2's
catalogs as ``<name>_<split>``. configs/datasets/README.md lists the keys.

Box shorthand: x0, y0, x1, y1 are absolute pixels from 0; x1 - x0 is the width (detectron2's
XYXY_ABS).
"""

import logging
import math
import os
import re
from functools import partial
from reprlib import repr as short  # a hostile card's values may be huge
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.utils.file_io import PathManager

from ..common.paths import resolve_path
from .card import Card
from .files import read_yaml
from .loading import load_split
from .mapper import SampleError

__all__ = [
    "Card",
    "card_of",
    "drop_degenerate_boxes",
    "load_card",
    "register_card",
    "register_cards",
    "resolve_path",
]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # names become parts of file names
_NAME_RULE = "a name of letters, digits, '_', '-' and '.'"
_KEYS = ("name", "format", "root", "splits", "classes", "evaluator", "year")
_registered: Dict[str, "Card"] = {}  # data set name -> the card that it came from


def load_card(path: str) -> Card:
    """Reads and checks a dataset card, but not the data set.

    Raises:
        ValueError: names the card, the key, what was given and what is possible.
    """
    # A link to a card and the card are the same card.
    path = os.path.realpath(path)

    def refuse(key, given, possible):
        raise ValueError(f"dataset card {path}: {key} is {short(given)}; expected {possible}")

    def expand(key, value, base):
        if not isinstance(value, str) or not value or "\0" in value:
            refuse(key, value, "a path")
        names = [a or b for a, b in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", value)]
        unset = [name for name in names if not os.environ.get(name)]
        if unset:
            refuse(key, value, f"the environment variable {unset[0]} to be set")
        value = os.path.expanduser(os.path.expandvars(value))
        return os.path.normpath(os.path.join(base, value))

    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"dataset card {error}") from error
    if not isinstance(raw, dict):
        refuse("the content", raw, f"a mapping with the keys {', '.join(_KEYS)}")
    for key in raw:
        if key not in _KEYS:
            raise ValueError(
                f"dataset card {path}: unknown key {short(key)}; known are {', '.join(_KEYS)}"
            )
    voc = raw.get("format") == "voc"
    needed = _KEYS[:4] + (("classes", "evaluator") if voc else ())
    if voc and raw.get("evaluator") == "pascal_voc":
        needed += ("year",)
    for key in needed:
        if raw.get(key) is None:
            raise ValueError(f"dataset card {path}: the key {key!r} is missing")

    if not _is_name(raw["name"]):
        refuse("name", raw["name"], _NAME_RULE)
    if raw["format"] not in ("voc", "coco"):
        refuse("format", raw["format"], "'voc' or 'coco'")
    evaluator = raw.get("evaluator", "coco")
    if evaluator not in (("coco", "pascal_voc") if voc else ("coco",)):
        refuse("evaluator", evaluator, "'coco', or with format voc 'pascal_voc'")
    year = raw.get("year")
    if year is not None and (not voc or year not in (2007, 2012)):
        refuse("year", year, "2007 or 2012, with format voc only")
    classes = raw.get("classes")
    if classes is not None:
        if not isinstance(classes, list) or not classes:
            refuse("classes", classes, "a list of class names")
        for i, name in enumerate(classes):
            key = f"classes[{i}]"
            if not isinstance(name, str) or not name.strip() or name in classes[:i]:
                refuse(key, name, "a new string (quotes make one of 1, yes or no)")
            if evaluator == "pascal_voc" and re.search(r"[/\\\0]", name):
                refuse(key, name, "no slash: the VOC evaluator writes a file of this name")
        classes = tuple(classes)

    root = expand("root", raw["root"], os.path.dirname(path))
    if not PathManager.isdir(root):
        refuse("root", raw["root"], f"an existing folder; {root} is none (paths start at the card)")
    splits = raw["splits"]
    if not isinstance(splits, dict) or not splits:
        refuse("splits", splits, "a mapping from split names to files")
    checked = {}
    for split, entry in splits.items():
        key = f"splits.{split}" if _is_name(split) else "a key of splits"
        if not _is_name(split):
            refuse(key, split, _NAME_RULE)
        if voc:
            if not _is_name(entry) or entry.endswith(".txt"):
                refuse(key, entry, "the name of a file in ImageSets/Main, without .txt")
            checked[split] = entry
        else:
            if not isinstance(entry, dict) or set(entry) != {"json", "images"}:
                refuse(key, entry, "a mapping with exactly the keys 'json' and 'images'")
            checked[split] = {k: expand(f"{key}.{k}", entry[k], root) for k in ("json", "images")}
    return Card(path, raw["name"], raw["format"], root, checked, classes, evaluator, year)


def register_cards(cards: Sequence[str]) -> List[str]:
    """Registers the cards of ``DATASETS.CARDS``, each found as `resolve_path` says."""
    names = []
    for card in cards:
        names += register_card(resolve_path(card, what="dataset card", key="DATASETS.CARDS"))
    return names


def register_card(path: str) -> List[str]:
    """Registers each split of a card as ``<name>_<split>``; annotations are read on first use.

    Registering the same card again changes nothing.

    Returns:
        The data set names.

    Raises:
        ValueError: the card is wrong, or one of its names belongs to another data set.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    card = load_card(path)
    names = {f"{card.name}_{split}": split for split in card.splits}
    for name in names:
        owner = _registered.get(name)
        if name in DatasetCatalog and owner != card:
            source = "detectron2 or other code"
            if owner is not None:
                source = "an older state of this file" if owner.path == card.path else owner.path
            raise ValueError(
                f"dataset card {card.path}: name: the data set {name!r} is already registered by "
                f"{source}; give the card another name"
            )
    for name, split in names.items():
        if name in DatasetCatalog:
            continue
        MetadataCatalog.pop(name, None)  # left behind when someone removed the data set
        meta = MetadataCatalog.get(name).set(evaluator_type=card.evaluator)
        if card.classes is not None:
            meta.thing_classes = list(card.classes)
        if card.format == "voc":
            meta.set(dirname=card.root, split=card.splits[split])
            if card.year is not None:
                meta.year = card.year
        else:
            files = card.splits[split]
            meta.set(json_file=files["json"], image_root=files["images"])
        DatasetCatalog.register(name, partial(load_split, card, split, name))
        _registered[name] = card
    return list(names)


def card_of(name: str) -> Optional[Tuple[Card, str]]:
    """The card that has registered a data set, and the split; None if no card has."""
    from detectron2.data import DatasetCatalog

    # Not by name: someone may have removed the data set and registered another one.
    loader = DatasetCatalog[name] if name in DatasetCatalog else None
    is_ours = isinstance(loader, partial) and loader.func is load_split
    return loader.args[:2] if is_ours else None


def drop_degenerate_boxes(dataset_dicts: Sequence[dict]) -> Tuple[List[dict], int]:
    """Drops the annotations whose box has no area, a coordinate that is no finite number, or no
    part inside its image.

    Boxes that end on the border, or reach over it, stay. Logs one warning if any box was dropped.

    Args:
        dataset_dicts: in detectron2's format; not changed. Each box goes by its ``bbox_mode``;
            "outside" isn't looked at for rotated boxes, nor where a record has no size.

    Returns:
        New dicts in the same order (an image that loses its last box stays), and the number of
        dropped annotations.

    Raises:
        SampleError: a box isn't made of numbers; names the image.
    """
    result, dropped_from = [], []
    num_flat = num_outside = 0
    for record in dataset_dicts:
        record = dict(record)
        result.append(record)
        if not record.get("annotations"):
            continue
        try:
            solid = [a for a in record["annotations"] if "bbox" not in a or _has_area(a)]
            kept = [a for a in solid if "bbox" not in a or not _is_outside(a, record)]
        except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise SampleError(
                f"{record.get('file_name')}: an annotation's bbox is not a box of numbers with a "
                f"bbox_mode ({type(error).__name__}: {error})"
            ) from error
        if len(kept) < len(record["annotations"]):
            num_flat += len(record["annotations"]) - len(solid)
            num_outside += len(solid) - len(kept)
            dropped_from.append(str(record.get("file_name", record.get("image_id"))))
        record["annotations"] = kept
    if dropped_from:
        counts = (num_flat, "without area"), (num_outside, "outside their image")
        what = " and ".join(f"{n} box{'es' * (n != 1)} {kind}" for n, kind in counts if n)
        logger.warning(
            f"Dropped {what} in {len(dropped_from)} of {len(result)} "
            f"images: {', '.join(dropped_from[:3])}{', ...' if len(dropped_from) > 3 else ''}"
        )
    return result, num_flat + num_outside


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _has_area(annotation: dict) -> bool:
    from detectron2.structures import BoxMode

    box = [float(v) for v in annotation["bbox"]]
    if annotation["bbox_mode"] in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
        box[2:4] = box[2] - box[0], box[3] - box[1]
    return all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0


def _is_outside(annotation: dict, record: dict) -> bool:
    from detectron2.structures import BoxMode

    width, height = record.get("width"), record.get("height")
    if annotation["bbox_mode"] not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) or not (
        width and height
    ):
        return False
    mode = BoxMode(annotation["bbox_mode"])
    box = BoxMode.convert([float(v) for v in annotation["bbox"]], mode, BoxMode.XYXY_ABS)
    return box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0
