"""Names and number of a model's classes, from the data sets of its config."""

import functools
import itertools
import logging
import os
from typing import Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import ConfigError, class_count
from .cards import card_of, register_cards
from .files import read_coco_json, read_yaml

logger = logging.getLogger(__name__)

_DEFAULT_COUNT = 80  # of COCO, in detectron2's config


def class_names(cfg: Optional[CfgNode], *, cards: bool = False) -> Optional[Sequence[str]]:
    """The names of a model's classes, None where they aren't known.

    They are those of the first data set in DATASETS.TRAIN, then TEST, that has a name for each of
    the model's classes.

    Args:
        cfg: the model's config, None if it has none.
        cards: also register the config's dataset cards. What is not on this machine stays unknown.
    """
    if cfg is None:
        return None
    if cards:
        try:
            register_cards(cfg.DATASETS.CARDS)
        except ConfigError as error:
            logger.warning(str(error))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = dataset_class_names(name)
        if names and len(names) == class_count(cfg)[1]:
            return names
    return None


def class_names_or_numbers(cfg: CfgNode) -> Tuple[str, ...]:
    """As :func:`class_names` with its cards; numbers where no data set knows the names."""
    return names_or_numbers(class_names(cfg, cards=True), cfg)


def names_or_numbers(names: Optional[Sequence[str]], cfg: CfgNode) -> Tuple[str, ...]:
    """The names of a model's classes, or their numbers where they aren't known."""
    return tuple(names or map(str, range(class_count(cfg)[1])))


def dataset_class_names(dataset: str) -> Optional[Tuple[str, ...]]:
    """The names of a data set's classes, in the order of their indices: those it is registered
    with, else those of its COCO json. None where they aren't known, or it isn't registered."""
    if dataset not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(dataset)
    names, path = metadata.get("thing_classes", None), metadata.get("json_file", None)
    if not names and path and metadata.get("evaluator_type", None) == "coco":
        if PathManager.isfile(path):
            changed = (
                (os.path.getmtime(path), os.path.getsize(path)) if os.path.exists(path) else ()
            )
            names = _names_in_json(path, *changed)
    return tuple(names) if names else None


@functools.lru_cache(maxsize=None)
def _names_in_json(path: str, *changed: float) -> Optional[Tuple[str, ...]]:
    """The names of a COCO json's categories by id; ``changed``: another file has other ones."""
    try:
        categories = read_coco_json(path)["categories"]
        return tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"]))
    except (KeyError, TypeError, ValueError):
        return None  # loading it says what is wrong


def fill_in_class_count(cfg: CfgNode, *, without_data: bool = False) -> None:
    """Sets the number of classes of a config's detector to that of its data set's card, unless it
    was set by hand: left at detectron2's default, 80.

    The data set is the first of DATASETS.TRAIN, or of TEST. Registers DATASETS.CARDS.

    Args:
        cfg: changed in place.
        without_data: whether a card whose data aren't there will do, if it names its classes.

    Raises:
        ConfigError: a card can't be found or is wrong.
    """
    key, count = class_count(cfg)
    if count != _DEFAULT_COUNT or not cfg.DATASETS.CARDS:
        return
    first = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[:1]
    try:
        register_cards(cfg.DATASETS.CARDS)
        classes = dataset_class_names(first[0]) if first and card_of(first[0]) else None
    except ConfigError:
        classes = _classes_in_cards(cfg.DATASETS.CARDS, first) if without_data else None
        if not classes:
            raise
    if classes:
        cfg.merge_from_list([key, len(classes)])


def _classes_in_cards(cards: Sequence[str], names: Sequence[str]) -> Optional[Sequence[str]]:
    """What a card itself says of the classes of the data set that ``names`` begins with."""
    for path in map(os.path.realpath, cards):
        try:
            card = read_yaml(path)
            if names[0] in {f"{card['name']}_{split}" for split in card["splits"]}:
                return card["classes"]
        except (IndexError, KeyError, OSError, TypeError, ValueError):
            continue
    return None


def first_difference(
    one: Sequence[str], other: Sequence[str]
) -> Tuple[int, Optional[str], Optional[str]]:
    """The first index at which two lists of class names differ, and both names there; None where
    one is at its end."""
    pairs = enumerate(itertools.zip_longest(one, other))
    return next((i, a, b) for i, (a, b) in pairs if a != b)
