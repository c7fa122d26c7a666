"""The names of a model's classes, from the data sets of its config."""

import itertools
import logging
from typing import Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import ConfigError, class_count
from .cards import register_cards

logger = logging.getLogger(__name__)


def class_names(cfg: Optional[CfgNode], *, load: bool = False) -> Optional[Sequence[str]]:
    """The names of a model's classes, None where they aren't known.

    They are those of the first data set in DATASETS.TRAIN, then TEST, that is registered with a
    name for each of the model's classes.

    Args:
        cfg: the model's config, None if it has none.
        load: also register the config's dataset cards, and load a data set whose names are known
            only then (``register_coco_instances``). What is not on this machine stays unknown.
    """
    if cfg is None:
        return None
    if load:
        try:
            register_cards(cfg.DATASETS.CARDS)
        except ConfigError as error:
            logger.warning(str(error))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = dataset_class_names(name, load=load) if name in DatasetCatalog else None
        if names and len(names) == class_count(cfg)[1]:
            return names
    return None


def class_names_or_numbers(cfg: CfgNode) -> Tuple[str, ...]:
    """As :func:`class_names` that loads; numbers where no data set knows the names."""
    return tuple(class_names(cfg, load=True) or map(str, range(class_count(cfg)[1])))


def dataset_class_names(dataset: str, *, load: bool = False) -> Optional[Sequence[str]]:
    """The names of a registered data set's classes, None where they aren't known.

    Args:
        load: load it, if its names are known only then.
    """
    metadata = MetadataCatalog.get(dataset)
    if load and not metadata.get("thing_classes", None) and metadata.get("json_file", None):
        try:
            DatasetCatalog.get(dataset)
        except Exception as error:  # a data set's loader is anyone's code
            logger.warning(f"{dataset}: {type(error).__name__} {error}")
    return metadata.get("thing_classes", None)


def first_difference(
    one: Sequence[str], other: Sequence[str]
) -> Tuple[int, Optional[str], Optional[str]]:
    """The first index at which two lists of class names differ, and both names there; None where
    one is at its end."""
    pairs = enumerate(itertools.zip_longest(one, other))
    return next((i, a, b) for i, (a, b) in pairs if a != b)
