"""What a run trains on: the records of ``DATASETS.TRAIN`` that can be used."""

from typing import List, Sequence

from detectron2.config import CfgNode
from detectron2.data.build import filter_images_with_only_crowd_annotations

from ..config import ConfigError
from ..data.cards import drop_degenerate_boxes
from ..data.loading import load_training_records
from ..data.outlines import check_outlines
from .preflight_data import check_classes


def usable_records(cfg: CfgNode) -> List[dict]:
    """The records less the boxes without area or outside their image, which it logs.

    Raises:
        ConfigError: for data sets that don't fit the model or hold no box to train on.
    """
    names = cfg.DATASETS.TRAIN
    dicts, _ = drop_degenerate_boxes(load_training_records(cfg))
    check_classes(cfg, keys=("TRAIN",))  # some data sets know their classes only now
    if cfg.MODEL.MASK_ON:
        check_outlines(dicts, polygons=cfg.INPUT.MASK_FORMAT == "polygon")
    # Afterwards, since an image may have had no other box.
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and "annotations" in dicts[0]:
        dicts = with_boxes(dicts, names)
    return dicts


def with_boxes(dicts: list, names: Sequence[str]) -> list:
    """The images with a box that isn't a crowd's.

    Raises:
        ConfigError: if there is none.
    """
    kept = filter_images_with_only_crowd_annotations(dicts)
    if not kept:
        raise ConfigError(
            f"DATASETS.TRAIN: there is no box to train on in {', '.join(names)}: all {len(dicts)} "
            "images are without one (boxes of crowds, without area or outside their image don't "
            "count)"
        )
    return kept
