"""What is checked of test data before a training or an evaluation: whether an evaluator can read
it, and whether all data sets mean the same by a class's index."""

import logging
import os
from reprlib import repr as short
from typing import Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..common.command_line import tool_command
from ..common.config_files import LAZY_CONFIG
from ..common.errors import one_line
from ..config import ConfigError, class_count
from ..data.card import Card
from ..data.cards import card_of, has_area
from ..data.class_names import dataset_class_names, first_difference
from ..data.fields import coco_evaluator_fault, voc_evaluator_fault, voc_list_fault
from ..data.files import read_coco_json, read_voc_annotation, read_voc_split
from ..data.mapper import SampleError, check_image
from .preflight import check_class_count

logger = logging.getLogger(__name__)

_Classes = Tuple[str, str, Sequence[str]]  # key below DATASETS, data set, class names


def check_test_data(cfg: CfgNode, *, evaluation: bool = False) -> None:
    """Loads each data set of DATASETS.TEST, and looks for what its evaluator reads and training
    doesn't. Of the images, the first is looked at.

    Boxes without area are told in the log: evaluators count them as objects that nobody finds.

    Args:
        cfg: with MODEL.MASK_ON outlines are needed too, with KEYPOINT_ON keypoints.
        evaluation: what makes AP too low is told in the log, and no error.

    Raises:
        ConfigError: for the first fault; names the data set, the file and the field.
    """
    for name in cfg.DATASETS.TEST:
        card, split = card_of(name) or (None, "")
        records = _load(name, is_ours=card is not None)
        fault, too_low = "", ""
        if card is not None and card.evaluator == "pascal_voc":
            fault, too_low = _voc_faults(card, split)
        else:
            fault = _coco_fault(name, cfg)
        if fault and card is not None:
            raise ConfigError(
                f"DATASETS.TEST: {name!r} can't be evaluated: dataset card {card.path}: "
                f"splits.{split}: {fault}\n"
                f"`{tool_command('prepare_data')} check {card.path}` lists all that is wrong."
            )
        if fault:
            raise ConfigError(f"DATASETS.TEST: {name!r} can't be evaluated: {fault}")
        if too_low and evaluation:
            logger.warning(f"DATASETS.TEST: {name!r}: {too_low}")
        elif too_low:
            raise ConfigError(f"DATASETS.TEST: {name!r}: dataset card {card.path}: {too_low}")
        boxes = [a for record in records for a in record.get("annotations", ()) if "bbox" in a]
        flat = sum(not a.get("iscrowd") and not has_area(a) for a in boxes)
        if flat:
            logger.warning(
                f"DATASETS.TEST: {name!r}: {flat} of {len(boxes)} boxes have no area; evaluations "
                "count them as objects that are missed"
            )


def _load(name: str, *, is_ours: bool) -> Sequence[dict]:
    meta = MetadataCatalog.get(name)
    path = meta.get("json_file")
    try:
        records = DatasetCatalog.get(name)
        first = records[0] if isinstance(records, list) and records else {}
        # An own loader may mean something else by it.
        if "file_name" in first and (path or meta.get("dirname")):
            check_image(first["file_name"])
    except Exception as error:  # detectron2's loaders and the user's raise what they like
        what = str(error)
        if not is_ours and not isinstance(error, SampleError):
            what = one_line(error) + (f" in {path}" if path and path not in what else "")
        raise ConfigError(f"DATASETS.TEST: {name!r}: {what}") from error
    return records if isinstance(records, list) else ()


def check_classes(
    cfg: CfgNode, *, keys: Sequence[str] = ("TRAIN", "TEST"), evaluation: bool = False
) -> None:
    """Refuses data sets of different class names or orders: AP would be wrong without a word.

    What isn't known (yet) is left out: a data set's own loader may name its classes only when it
    runs.

    Args:
        keys: below DATASETS.
        evaluation: training data of another number of classes than the model's are left out: the
            model has learned from others.

    Raises:
        ConfigError: names both data sets and the first difference.
    """
    known = [
        (key, name, names)
        for key in keys
        for name in cfg.DATASETS[key]
        for names in [dataset_class_names(name)]
        if names and not (evaluation and key == "TRAIN" and len(names) != class_count(cfg)[1])
    ]
    for other in known[1:]:
        _check_same(known[0], other, evaluation)
    for _, name, names in known:
        check_class_count(cfg, name, names)


def check_same_everywhere(cfg: CfgNode, num_images: int) -> None:
    """Refuses processes (on other machines) whose training data have other classes or another
    number of images. Call it in every process, when the data are loaded.

    Raises:
        ConfigError: in every process; names the data set and the first difference.
    """
    names = {name: list(dataset_class_names(name) or ()) for name in cfg.DATASETS.TRAIN}
    (first, number), *others = comm.all_gather((names, num_images))
    for rank, (theirs, their_number) in enumerate(others, 1):
        here, there = f"process {rank}", "the main process"
        for name in cfg.DATASETS.TRAIN:
            if theirs[name] != first[name]:
                index, a, b = first_difference(first[name], theirs[name])
                raise ConfigError(
                    f"DATASETS.TRAIN: {name!r} has other classes in {here} than in {there}: class "
                    f"{index} is {b!r} and {a!r}; give all machines the same data"
                )
        if their_number != number:
            raise ConfigError(
                f"DATASETS.TRAIN: {their_number} images in {here} and {number} in {there}; give "
                "all machines the same data"
            )


def _check_same(one: _Classes, other: _Classes, evaluation: bool) -> None:
    (key, first, theirs), (other_key, second, ours) = one, other
    if ours == theirs:
        return
    index, *pair = first_difference(theirs, ours)
    here, there = ("missing" if name is None else short(name) for name in pair)
    advice = "give both the same categories, in the order of their ids"
    if evaluation and key == "TRAIN":
        advice += "; or, if the model has learned from other data, set DATASETS.TRAIN '()'"
    raise ConfigError(
        f"DATASETS.{other_key}: {second!r} has other classes than {first!r} in DATASETS.{key}: "
        f"class {index} is {here} in {first!r} and {there} in {second!r}. A model knows classes by "
        f"their index: {advice}"
    )


def _coco_fault(name: str, cfg: CfgNode) -> str:
    meta = MetadataCatalog.get(name)
    path = meta.get("json_file")
    if meta.get("evaluator_type") != "coco" or not path:
        return ""
    try:
        content = read_coco_json(path)
    except (OSError, ValueError) as error:
        return f"{path}: {one_line(error)}"
    # How many a LazyConfig's model has isn't in its keys.
    has_points = cfg.MODEL.KEYPOINT_ON and LAZY_CONFIG not in cfg
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if has_points else 0
    fault = coco_evaluator_fault(content, masks=cfg.MODEL.MASK_ON, keypoints=keypoints)
    if not fault and "annotations" in content:
        if all(x["iscrowd"] for x in content["annotations"]):  # AP would be NaN
            fault = "'annotations' has no object but crowds, so that there is nothing to find"
    return f"{path}: {fault}" if fault else ""


def _voc_faults(card: Card, split: str) -> Tuple[str, str]:
    """What VOC's evaluator can't read, and what makes its AP too low; "" each if nothing."""
    needs = (
        "detectron2's VOC evaluator needs <pose>, <truncated>, <difficult> and whole numbers as "
        "coordinates; `evaluator: coco` in the card does without"
    )
    fault = voc_list_fault(card.root, card.splits[split])
    if fault:
        return fault, ""
    counted = set()
    for image_id in read_voc_split(card.root, card.splits[split]):
        path = os.path.join(card.root, "Annotations", image_id + ".xml")
        for number, (name, _, element) in enumerate(read_voc_annotation(path)[1], 1):
            fault = voc_evaluator_fault(element)
            if fault:
                return f"{path}: object {number}, {name[:80]}: no usable {fault}; {needs}", ""
            if not int(element.find("difficult").text):
                counted.add(name)
    lacking = [name for name in card.classes if name not in counted]
    if not lacking:
        return "", ""
    return "", (
        f"splits.{split}: there is no object of {short(lacking[0])} but difficult ones "
        f"({len(lacking)} of {len(card.classes)} classes), and detectron2's VOC evaluator counts "
        "such a class as AP 0 or NaN. `evaluator: coco` in the card leaves it out of the mean"
    )
