"""The checks behind ``tools/prepare_data.py check``: what is wrong with a data set on disk.

The raw files are read, not detectron2's dicts, so that one bad file hides no other: each fault
becomes a finding. `KINDS` lists all that is looked for.
"""

import itertools
import os
from collections import Counter
from typing import Dict, List

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..common.paths import resolve_path
from .annotations import ListedImage, check_coco, check_voc
from .card import Card, CocoCard, VocCard, load_card
from .files import ImageFacts, inspect_image
from .findings import Findings
from .near_duplicates import MISSING, alike, is_available


def check_dataset(target: str) -> Findings:
    """Checks a dataset card, or a data set by its registered name such as voc_2007_train.

    Raises:
        ValueError: what ``target`` names can't be checked: a wrong card, or a missing folder.
        FileNotFoundError: ``target`` is neither.
    """
    if target in DatasetCatalog:
        return check_card(_registered_as_card(target))
    names = f"a registered data set: none of the {len(DatasetCatalog)} has this name"
    return check_card(
        load_card(resolve_path(target, what="dataset card", key="check", extra_tried=[names]))
    )


def check_card(card: Card) -> Findings:
    """Reads all splits of a card and every file that they name; images are decoded in full."""
    report = Findings(card)
    read = check_voc if card.format == "voc" else check_coco
    pictures: Dict[str, List[ListedImage]] = {}
    for split in card.splits:
        report.counts[split] = Counter()
        pictures[split] = read(report, split)
        report.counts[split]["images"] = len(pictures[split])
    _check_pictures(report, pictures)
    for split, counts in report.counts.items():
        if counts["boxes"]:
            for index, name in enumerate(report.classes):
                if not counts[index]:
                    report.add("class without boxes", f"{split}: {name}")
    return report


def _registered_as_card(name: str) -> Card:
    meta = MetadataCatalog.get(name)
    evaluator, classes = meta.get("evaluator_type", "coco"), meta.get("thing_classes")
    classes = tuple(classes) if classes else None
    both = {"name": name, "classes": classes, "evaluator": evaluator}
    hint = f"DETECTRON2_DATASETS is {os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}"
    if evaluator not in ("coco", "pascal_voc"):
        raise ValueError(f"{name}: data sets of the kind {evaluator!r} can't be checked")
    if meta.get("dirname") and meta.get("split"):
        if not PathManager.isdir(meta.dirname):
            raise ValueError(f"{name}: its folder {meta.dirname} doesn't exist ({hint})")
        return VocCard.model_construct(
            format="voc",
            root=meta.dirname,
            splits={name: meta.split},
            year=meta.get("year"),
            **both,
        )
    if not meta.get("json_file") or meta.get("image_root") is None:
        raise ValueError(f"{name}: it is neither a VOC folder nor a COCO json file")
    if not PathManager.isfile(meta.json_file):
        try:
            DatasetCatalog.get(name)  # a generated data set is written by its first use
        except FileNotFoundError as error:
            raise ValueError(f"{name}: {meta.json_file} doesn't exist ({hint})") from error
    splits = {name: {"json": meta.json_file, "images": meta.image_root}}
    root = os.path.dirname(os.path.commonprefix([meta.json_file, meta.image_root]))
    return CocoCard.model_construct(format="coco", root=root, splits=splits, **both)


def _check_pictures(report: Findings, pictures: Dict[str, List[ListedImage]]) -> None:
    """Decodes every image once, and compares the splits by content (by path where unreadable)."""
    facts: Dict[str, ImageFacts] = {}
    paths = dict.fromkeys(picture.path for split in pictures.values() for picture in split)
    for path in tqdm(paths, unit=" images", leave=False, disable=None):
        facts[path] = inspect_image(path)
        for kind, detail in facts[path].faults:
            report.add(kind, f"{path}{': ' if detail else ''}{detail}")
    contents: Dict[str, Dict[str, str]] = {}
    for split, members in pictures.items():
        contents[split] = {}
        for path, size in members:
            fact = facts[path]
            if size and fact.size and size != fact.size:
                turned = ", turned by its EXIF tag" if fact.size != fact.stored_size else ""
                sizes = "annotation {}x{}, image {}x{}".format(*size, *fact.size)
                report.add("image size mismatch", f"{path}: {sizes}{turned}")
            key = fact.digest or path
            if key in contents[split]:
                report.add("picture twice", f"{path} and {contents[split][key]} in {split}")
            contents[split].setdefault(key, path)

    def has_hash(path: str) -> bool:
        return facts[path].hash is not None

    for one, two in itertools.combinations(contents, 2):
        small, large = sorted((one, two), key=lambda split: len(contents[split]))
        shared = contents[small].keys() & contents[large].keys()
        if small in large and shared and len(shared) == len(contents[small]):
            report.add("split inside a split", f"{large} contains {small}")  # trainval and train
            continue
        for key, path in contents[small].items():
            if key in shared:
                other = contents[large][key]
                also = f" (there {other})" if other != path else ""
                report.add("picture in two splits", f"{path} in {small} and {large}{also}")
        ours, theirs = (
            [path for key, path in contents[split].items() if key not in shared and has_hash(path)]
            for split in (small, large)
        )
        pairs = alike([facts[path].hash for path in ours], [facts[path].hash for path in theirs])
        for i, j in pairs:
            report.add("alike in two splits", f"{ours[i]} in {small}, {theirs[j]} in {large}")
    if len(contents) > 1 and not is_available():
        report.not_looked_for.append(f"photos that look alike in two splits: {MISSING}")
