"""The checks behind ``tools/prepare_data.py check``: what is wrong with a data set on disk.

The raw files are read, not detectron2's dicts, so that one bad file hides no other: each fault
becomes a finding. `KINDS` lists all that is looked for.
"""

import itertools
import os
import sys
import time
from collections import Counter
from typing import Any, Dict, List, Tuple

from detectron2.utils.file_io import PathManager

from ..common.paths import resolve_path
from .annotations import Picture, check_coco, check_voc
from .cards import Card, load_card
from .files import ImageFacts, inspect_image

__all__ = ["KINDS", "Report", "check_card", "check_dataset"]

# What is looked for: kind -> (severity, what it means for a run).
KINDS: Dict[str, Tuple[str, str]] = {
    "unreadable split": ("error", "the list of images is missing or broken; nothing of it is used"),
    "missing annotation": ("error", "training stops"),
    "unreadable annotation": ("error", "training stops"),
    "missing image": ("error", "training stops"),
    "unreadable image": ("error", "training stops"),
    "truncated image": ("error", "training stops"),
    "image too large": ("error", "over Pillow's limit against decompression bombs; not decoded"),
    "more than 8 bits": ("error", "training stops; detectron2 would clip the pixels at 255"),
    "image size mismatch": ("error", "training stops"),
    "broken record": (
        "error",
        "a field that detectron2 or the evaluator reads is missing or wrong",
    ),
    "duplicate id": ("error", "images or boxes replace each other"),
    "unknown class": ("error", "training stops"),
    "different classes": ("error", "class ids would mean different things"),
    "box not finite": ("error", "training drops these boxes and says how many"),
    "box without area": ("error", "training drops these boxes and says how many"),
    "box outside image": (
        "error",
        "cut off at the border in training, or dropped; VOC pixels count from 1",
    ),
    "annotation id 0": ("warning", "the COCO evaluator never counts this box as found"),
    "box of no image": ("warning", "these boxes are never used"),
    "unusable outline": ("warning", "no polygon with 3 points; detectron2 skips the object"),
    "not for the VOC evaluator": ("warning", "refused in DATASETS.TEST; training reads it"),
    "class without boxes": ("warning", "no AP for this class on this split"),
    "EXIF orientation": (
        "warning",
        "detectron2 turns the image; the boxes must fit the turned one",
    ),
    "bad EXIF": ("warning", "detectron2 ignores it; other programs may turn the image"),
    "picture in two splits": ("warning", "results on one say little if training saw the other"),
    "picture twice": ("warning", "the same picture more than once in one split"),
    "split inside a split": ("note", "never train on one and test on the other"),
    "image without boxes": ("note", "left out of training by DATALOADER.FILTER_EMPTY_ANNOTATIONS"),
    "duplicate box": ("note", "the same class and box more than once in one image"),
}
# detectron2's VOC evaluator takes the mean over all classes of a card.
_CLASS_WITHOUT_BOXES = {
    2007: "AP 0 for this class on this split, which the mean counts",
    2012: "AP 0 for this class on this split, which the mean counts; NaN once it is detected",
}
_EXAMPLES = 5


class Report:
    """What `check_card` found.

    Attributes:
        found: kind -> the places, each once however many splits share it.
        counts: split -> number of "images", "boxes", and of boxes under each class's index.
        classes: the class names.
    """

    def __init__(self, card: Card):
        self.card = card
        self.found: Dict[str, Dict[str, None]] = {}
        self.counts: Dict[str, Counter] = {}
        self.classes: Tuple[str, ...] = card.classes or ()

    def add(self, kind: str, where: str) -> None:
        """Records a finding of one of the `KINDS`; the same one twice counts once."""
        where = where.replace(self.card.root + os.sep, "") if self.card.root else where
        self.found.setdefault(kind, {})[where] = None

    def meaning(self, kind: str) -> str:
        """Returns what a kind of finding means for a run on this card."""
        if kind == "class without boxes" and self.card.evaluator == "pascal_voc":
            return _CLASS_WITHOUT_BOXES.get(self.card.year, _CLASS_WITHOUT_BOXES[2012])
        return KINDS[kind][1]

    def total(self, severity: str) -> int:
        """Returns the number of findings of a severity: "error", "warning" or "note"."""
        return sum(len(v) for kind, v in self.found.items() if KINDS[kind][0] == severity)

    def __str__(self) -> str:
        card, splits = self.card, list(self.counts)
        rows = [("", *splits)]
        for key, title in (("images", "images"), ("boxes", "boxes"), *enumerate(self.classes)):
            title = f"  {_printable(title)}" if isinstance(key, int) else title
            rows.append((title, *(f"{self.counts[split][key]:,}" for split in splits)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"{card.name}: {card.format.upper()} format, {len(self.classes)} classes"]
        lines += [f"  card  {card.path}"] if card.path else []
        lines += [f"  root  {card.root}", ""] if card.root else [""]
        for first, *rest in rows:
            cells = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:]))
            lines.append(f"  {first:<{widths[0]}}{cells}")
        for severity in ("error", "warning", "note"):
            kinds = [k for k, v in KINDS.items() if v[0] == severity and k in self.found]
            for kind in kinds:
                places = list(self.found[kind])
                lines += ["", f"{severity}: {kind} ({len(places):,}) - {self.meaning(kind)}"]
                lines += [f"  {_printable(place)}" for place in places[:_EXAMPLES]]
                if len(places) > _EXAMPLES:
                    lines.append(f"  ... and {len(places) - _EXAMPLES:,} more")
        totals = [(self.total(s), s) for s in ("error", "warning", "note")]
        return "\n".join([*lines, "", ", ".join(f"{n:,} {s}{'s' * (n != 1)}" for n, s in totals)])


def check_dataset(target: str) -> Report:
    """Checks a dataset card, or a data set by its registered name such as voc_2007_train.

    Raises:
        ValueError: what ``target`` names can't be checked: a wrong card, or a missing folder.
        FileNotFoundError: ``target`` is neither.
    """
    from detectron2.data import DatasetCatalog

    if target in DatasetCatalog:
        return check_card(_registered_as_card(target))
    names = f"a registered data set: none of the {len(DatasetCatalog)} has this name"
    return check_card(
        load_card(resolve_path(target, what="dataset card", key="check", extra_tried=[names]))
    )


def check_card(card: Card) -> Report:
    """Reads all splits of a card and every file that they name; images are decoded in full."""
    report = Report(card)
    read = check_voc if card.format == "voc" else check_coco
    pictures: Dict[str, List[Picture]] = {}
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
    from detectron2.data import DatasetCatalog, MetadataCatalog

    meta = MetadataCatalog.get(name)
    evaluator, classes = meta.get("evaluator_type", "coco"), meta.get("thing_classes")
    classes = tuple(classes) if classes else None
    hint = f"DETECTRON2_DATASETS is {os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}"
    if evaluator not in ("coco", "pascal_voc"):
        raise ValueError(f"{name}: data sets of the kind {evaluator!r} can't be checked")
    if meta.get("dirname") and meta.get("split"):
        if not PathManager.isdir(meta.dirname):
            raise ValueError(f"{name}: its folder {meta.dirname} doesn't exist ({hint})")
        splits: Dict[str, Any] = {name: meta.split}
        return Card("", name, "voc", meta.dirname, splits, classes, evaluator, meta.get("year"))
    if not meta.get("json_file") or meta.get("image_root") is None:
        raise ValueError(f"{name}: it is neither a VOC folder nor a COCO json file")
    if not PathManager.isfile(meta.json_file):
        try:
            DatasetCatalog.get(name)  # a generated data set is written by its first use
        except FileNotFoundError as error:
            raise ValueError(f"{name}: {meta.json_file} doesn't exist ({hint})") from error
    splits = {name: {"json": meta.json_file, "images": meta.image_root}}
    root = os.path.dirname(os.path.commonprefix([meta.json_file, meta.image_root]))
    return Card("", name, "coco", root, splits, classes, evaluator)


def _check_pictures(report: Report, pictures: Dict[str, List[Picture]]) -> None:
    """Decodes every image once, and compares the splits by content (by path where unreadable)."""
    facts: Dict[str, ImageFacts] = {}
    progress = _Progress(len({picture.path for split in pictures.values() for picture in split}))
    contents: Dict[str, Dict[str, str]] = {}
    for split, members in pictures.items():
        contents[split] = {}
        for path, size in members:
            if path not in facts:
                facts[path] = inspect_image(path)
                progress.step()
                for kind, detail in facts[path].faults:
                    report.add(kind, f"{path}{': ' if detail else ''}{detail}")
            fact = facts[path]
            if size and fact.size and size != fact.size:
                turned = ", turned by its EXIF tag" if fact.size != fact.stored_size else ""
                sizes = "annotation {}x{}, image {}x{}".format(*size, *fact.size)
                report.add("image size mismatch", f"{path}: {sizes}{turned}")
            key = fact.digest or path
            if key in contents[split]:
                report.add("picture twice", f"{path} and {contents[split][key]} in {split}")
            contents[split].setdefault(key, path)
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


def _printable(text: str) -> str:
    # Names from untrusted files: no control characters for the terminal, no novels.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:400])


class _Progress:
    """Says every few seconds on stderr how far the images are."""

    def __init__(self, total: int, period: float = 5.0):
        self.total, self.period = total, period
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last < self.period:
            return
        self.last = now
        left = (now - self.start) / self.done * (self.total - self.done)
        print(
            f"{self.done:,} of {self.total:,} images, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
