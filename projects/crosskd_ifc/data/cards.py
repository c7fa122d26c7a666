"""Dataset cards: a custom data set as one small YAML file, and the dropping of boxes without area.

A card names a VOC folder or COCO json files; `register_card` adds its splits to detectron2's
catalogs as ``<name>_<split>``. configs/datasets/README.md lists the keys.

Box shorthand: x0, y0, x1, y1 are absolute pixels from 0; x1 - x0 is the width (detectron2's
XYXY_ABS).
"""

import logging
import math
import os
from functools import partial
from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..common.files import file_sha256
from ..common.paths import resolve_path
from ..config import ConfigError
from .card import Card, load_card
from .files import voc_files
from .findings import COUNTED
from .loading import load_split
from .mapper import SampleError

logger = logging.getLogger(__name__)


def register_cards(cards: Sequence[str]) -> List[str]:
    """Registers the cards of ``DATASETS.CARDS``, each found as `resolve_path` says.

    Raises:
        ConfigError: a card can't be found or is wrong.
    """
    names = []
    for card in cards:
        try:
            path = resolve_path(card, what="dataset card", key="DATASETS.CARDS")
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from None
        try:
            names += register_card(path)
        except ValueError as error:
            raise ConfigError(f"DATASETS.CARDS: {error}") from error
    return names


def register_card(path: str) -> List[str]:
    """Registers each split of a card as ``<name>_<split>``; annotations are read on first use.

    Registering the same card again changes nothing.

    Returns:
        The data set names.

    Raises:
        ValueError: the card is wrong, or one of its names belongs to another data set.
    """
    card = load_card(path)
    names = {f"{card.name}_{split}": split for split in card.splits}
    for name in names:
        owner, _ = card_of(name) or (None, "")
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
    return list(names)


def counted_detections(name: str, limit: int) -> Optional[int]:
    """How many detections of an image COCO's AP is to count: all that a model may give, where a
    card's data set is evaluated, whose photos may have more objects; else COCO's 100, told as None.

    Args:
        name: of the data set.
        limit: of the model, ``TEST.DETECTIONS_PER_IMAGE``.
    """
    return limit if limit > COUNTED and card_of(name) else None


def card_of(name: str) -> Optional[Tuple[Card, str]]:
    """The card that has registered a data set, and the split; None if no card has."""
    # Not by name: someone may have removed the data set and registered another one.
    loader = DatasetCatalog[name] if name in DatasetCatalog else None
    is_ours = isinstance(loader, partial) and loader.func is load_split
    return loader.args[:2] if is_ours else None


def describe_data(cards: Sequence[str], names: Sequence[str]) -> Dict[str, list]:
    """What makes the data sets of cards what they are, but for the pictures themselves.

    Args:
        cards: as of :func:`register_cards`.
        names: data sets; those that no card has are left out.

    Returns:
        Name -> format, classes, evaluator and year of its card, and the SHA-256 of each of its
        annotation files. Where they lie doesn't matter, nor how the card is written.

    Raises:
        FileNotFoundError, ValueError: if a card or its data aren't there, or can't be read.
    """
    found = {}
    for file in cards:
        card = load_card(resolve_path(file, what="dataset card", key="DATASETS.CARDS"))
        for split, source in card.splits.items():
            name = f"{card.name}_{split}"
            if name not in names:
                continue
            paths = [source["json"]] if card.format == "coco" else voc_files(card.root, source)
            hashes = [file_sha256(path) for path in paths]
            if not all(hashes):
                raise FileNotFoundError(f"{paths[hashes.index('')]}: no such file")
            found[name] = [card.format, card.classes, card.evaluator, card.year, *hashes]
    return found


def locate_cards(cfg: CfgNode) -> None:
    """Makes the paths of DATASETS.CARDS that are found from the current folder absolute: what a run
    keeps of its config means the same cards wherever it is read.

    Args:
        cfg: changed in place.
    """
    places = [os.path.abspath(os.path.expanduser(card)) for card in cfg.DATASETS.CARDS]
    pairs = zip(cfg.DATASETS.CARDS, places)
    cfg.DATASETS.CARDS = tuple(place if os.path.isfile(place) else card for card, place in pairs)


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
            solid = [a for a in record["annotations"] if "bbox" not in a or has_area(a)]
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


def has_area(annotation: dict) -> bool:
    """Whether an annotation's box has an area, and finite numbers."""
    box = [float(v) for v in annotation["bbox"]]
    if annotation["bbox_mode"] in (BoxMode.XYXY_ABS, BoxMode.XYXY_REL):
        box[2:4] = box[2] - box[0], box[3] - box[1]
    return all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0


def _is_outside(annotation: dict, record: dict) -> bool:
    width, height = record.get("width"), record.get("height")
    if annotation["bbox_mode"] not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) or not (
        width and height
    ):
        return False
    mode = BoxMode(annotation["bbox_mode"])
    box = BoxMode.convert([float(v) for v in annotation["bbox"]], mode, BoxMode.XYXY_ABS)
    return box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0
