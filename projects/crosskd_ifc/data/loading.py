"""Loads a split of a dataset card through detectron2, after a look at what detectron2 would stop at
without a file's name, or take as it is.

Box shorthand:
    xmin, ymin, xmax, ymax: a box in a VOC file, where pixels count from 1 and xmax, ymax are inside
    x0, y0, x1, y1: the same in detectron2's XYXY_ABS: x0 = xmin - 1, x1 = xmax
"""

import os
from collections import Counter
from typing import List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, load_voc_instances
from torch.utils.data import IterableDataset

from ..common.command_line import tool_command
from ..config import ConfigError
from .card import Card
from .fields import text_id_fault
from .files import read_coco_json, read_voc_annotation, read_voc_split, voc_list_path
from .mapper import SampleError
from .outlines import is_outline, outline_fault


def load_training_records(cfg: CfgNode) -> List[dict]:
    """The images of all DATASETS.TRAIN in detectron2's format, also those without a box.

    Each has its ``dataset_name``. A torch ``Dataset`` in the catalog is read like a list.

    Raises:
        ConfigError: for a data set that can't be counted.
    """
    records: List[dict] = []
    has_keypoints = cfg.MODEL.KEYPOINT_ON
    for index, name in enumerate(cfg.DATASETS.TRAIN):
        found = get_detection_dataset_dicts(
            [name],
            filter_empty=False,
            min_keypoints=(
                cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if has_keypoints else 0
            ),
            proposal_files=(
                cfg.DATASETS.PROPOSAL_FILES_TRAIN[index : index + 1]
                if cfg.MODEL.LOAD_PROPOSALS
                else None
            ),
        )
        if isinstance(found, IterableDataset):
            raise ConfigError(
                f"DATASETS.TRAIN: {name!r} is a torch IterableDataset, whose images have no "
                "numbers to shuffle and resume by; register a list of records, or a Dataset with "
                "a length"
            )
        records += [{**found[i], "dataset_name": name} for i in range(len(found))]
    return records


def load_split(card: Card, split: str, name: str) -> List[dict]:
    """Reads one split.

    Args:
        name: the data set's name in detectron2's catalogs.

    Returns:
        Records in detectron2's format.

    Raises:
        SampleError: for whatever is wrong; names the card, the split and the file.
    """
    source = card.splits[split]
    try:
        if card.format == "voc":
            return _load_voc(card.root, source, card.classes)
        _check_coco(source["json"])
        try:
            return load_coco_json(source["json"], source["images"], name)
        except Exception as error:  # KeyError, AssertionError and others, without the file's name
            reason = f"{type(error).__name__}: {error}"
            if "thing_classes" in reason:  # detectron2 refuses a second value in the metadata
                lists = reason.splitlines()[-1]
                reason = f"its categories are not the card's classes (card != json): {lists}"
            raise ValueError(f"{source['json']}: {reason}") from error
    except ValueError as error:
        raise SampleError(
            f"dataset card {card.path}: splits.{split}: {error}\n"
            f"`{tool_command('prepare_data')} check {card.path}` lists everything that is wrong."
        ) from error


def _check_coco(path: str) -> None:
    # detectron2 lets the later of two images with one id replace the other, counts a category for
    # each time that it is there, and names no file or annotation in its errors.
    content = read_coco_json(path)
    if not content["images"]:
        raise ValueError(f"{path}: there are no images in it")
    for key in ("images", "categories"):
        ids = [repr(record.get("id")) for record in content[key] if isinstance(record, dict)]
        for item, count in _repeated(ids):
            raise ValueError(f"{path}: {count} {key} have the id {item}")
    sizes = {
        image["id"]: (image.get("height"), image.get("width"))
        for image in content["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), (int, str))
    }
    for record in content.get("annotations", []):
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), (int, str)):
            continue  # detectron2 says what is missing
        outline, size = record.get("segmentation"), sizes.get(record["image_id"])
        fault = text_id_fault(record, sizes)
        if not is_outline(outline):
            fault = fault or (
                "its segmentation is no list of polygons, [[x1, y1, x2, y2, ...], ...], and no "
                "run-length code"
            )
        elif not fault and outline:
            said = outline_fault(outline, size)
            fault = f"its segmentation: {said}" if said else ""
        if fault:
            raise ValueError(f"{path}: annotation {str(record.get('id'))[:80]}: {fault}")


def _repeated(items: Sequence[str]) -> List[Tuple[str, int]]:
    """What is there more than once, with how often; the most frequent first."""
    return [(item[:80], n) for item, n in Counter(items).most_common() if n > 1]


def _load_voc(root: str, split: str, classes: Sequence[str]) -> List[dict]:
    ids = read_voc_split(root, split)
    for image_id, count in _repeated(ids):  # VOC's AP would miss the boxes of each copy
        raise ValueError(
            f"{voc_list_path(root, split)}: the image {image_id!r} is there {count} times"
        )
    # detectron2 parses XML as it comes and names no file in its errors: look at all files first.
    for image_id in ids:
        path = os.path.join(root, "Annotations", image_id + ".xml")
        size, objects = read_voc_annotation(path)
        if min(size) < 1:
            raise ValueError(f"{path}: <size> is {size[0]} x {size[1]} pixels")
        for name, _, _ in objects:
            if name not in classes:
                raise ValueError(f"{path}: class {name!r} is none of {', '.join(classes)}")
    records = load_voc_instances(root, split, list(classes))
    for record in records:
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            # An empty box of the file, xmax <= xmin; detectron2's x0 = xmin - 1 gave it a pixel.
            x0 = x1 if 0 < x1 - x0 <= 1 else x0
            y0 = y1 if 0 < y1 - y0 <= 1 else y0
            annotation["bbox"] = [x0, y0, x1, y1]
    return records
