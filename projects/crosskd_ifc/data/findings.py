"""What a check of a data set can find, and what it has found."""

import json
import os
import re
from collections import Counter, defaultdict
from typing import Any, Dict, List, Optional, Tuple

from .card import Card

COUNTED = 100  # detections of an image by detectron2, and of an image and class by COCO's AP
# What is looked for: kind -> (severity, what it means for a run).
KINDS: Dict[str, Tuple[str, str]] = {
    "unreadable split": ("error", "the list of images is missing or broken; nothing of it is used"),
    "missing annotation": ("error", "training stops"),
    "unreadable annotation": ("error", "training stops"),
    "missing image": ("error", "training stops"),
    "unreadable image": ("error", "training stops"),
    "truncated image": ("error", "training stops"),
    "image too large": (
        "error",
        "over twice Pillow's limit against decompression bombs; training stops",
    ),
    "large image": ("warning", "over Pillow's limit; decoded all the same, which takes memory"),
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
    "broken outline": ("error", "training stops"),
    "unusable outline": ("error", "no polygon of three points; training drops the object"),
    "annotation id 0": ("warning", "the COCO evaluator never counts this box as found"),
    "box of no image": ("warning", "these boxes are never used"),
    "not for the VOC evaluator": ("warning", "refused in DATASETS.TEST; training reads it"),
    "class without boxes": ("warning", "no AP for this class on this split"),
    "more than 100 objects": (
        "warning",
        "TEST.DETECTIONS_PER_IMAGE, 100 by default, limits the AP; `configs` raises it",
    ),
    "EXIF orientation": (
        "warning",
        "detectron2 turns the image; the boxes must fit the turned one",
    ),
    "bad EXIF": ("warning", "detectron2 ignores it; other programs may turn the image"),
    "picture in two splits": ("warning", "results on one say little if training saw the other"),
    "alike in two splits": ("warning", "photos that look alike; as for a picture in two splits"),
    "picture twice": ("warning", "the same picture more than once in one split"),
    "split inside a split": ("note", "never train on one and test on the other"),
    "image without boxes": ("note", "left out of training by DATALOADER.FILTER_EMPTY_ANNOTATIONS"),
    "crowd": ("note", "not trained on, ignored in the evaluation; CVAT exports masks as crowds"),
    "duplicate box": ("note", "the same class and box more than once in one image"),
}


class Findings:
    """What `check_card` found.

    Attributes:
        found: kind -> the places, each once however many splits share it.
        counts: split -> number of "images", "boxes", and of boxes under each class's index; a
            crowd is none.
        classes: the class names.
        sizes: split -> (width, height) of each box, in pixels.
        unknown: class -> number of boxes, of classes in the annotations that the card lacks.
        in_file: all classes of a COCO file, in the order of their ids, if the card's are others.
        not_looked_for: what couldn't be, with the reason.
    """

    def __init__(self, card: Card):
        self.card = card
        self.found: Dict[str, Dict[str, None]] = {}
        self.counts: Dict[str, Counter] = {}
        self.classes: Tuple[str, ...] = card.classes or ()
        self.sizes: Dict[str, List[Tuple[float, float]]] = defaultdict(list)
        self.unknown: Counter = Counter()
        self.in_file: Tuple[str, ...] = ()
        self.not_looked_for: List[str] = []

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

    def as_dict(self) -> Dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {
            "card": self.card.path,
            "name": self.card.name,
            "classes": list(self.classes),
            "splits": {
                split: {
                    "images": counts["images"],
                    "boxes": counts["boxes"],
                    "classes": {name: counts[i] for i, name in enumerate(self.classes)},
                }
                for split, counts in self.counts.items()
            },
            "unknown_classes": dict(self.unknown),
            "findings": [
                {"kind": k, "severity": KINDS[k][0], "means": self.meaning(k), "places": list(v)}
                for k, v in self.found.items()
            ],
            "not_looked_for": self.not_looked_for,
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, examples: Optional[int] = 5) -> str:
        """Returns a report for people.

        Args:
            examples: places shown of each kind; None for all.
        """
        card, splits = self.card, list(self.counts)
        rows = [("", *splits)]
        for key, title in (("images", "images"), ("boxes", "boxes"), *enumerate(self.classes)):
            title = f"  {quoted(title)}" if isinstance(key, int) else title
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
                lines += [f"  {_printable(place)}" for place in places[:examples]]
                if examples is not None and len(places) > examples:
                    lines.append(f"  ... and {len(places) - examples:,} more (--all shows them)")
        if self.unknown:
            counts = ", ".join(f"{quoted(n)} {k:,}" for n, k in self.unknown.most_common())
            lines += ["", f"classes that the card lacks, with their boxes: {_printable(counts)}"]
        if self.unknown or self.in_file:
            names = list(self.in_file) or [*self.classes, *sorted(self.unknown)]
            text = _printable(json.dumps(names, ensure_ascii=False))
            lines += [] if self.unknown else [""]
            lines += ["to have them all, put into the card:", f"  classes: {text}"]
        lines += [""] * bool(self.not_looked_for)
        lines += [f"not looked for: {what}" for what in self.not_looked_for]
        totals = [(self.total(s), s) for s in ("error", "warning", "note")]
        return "\n".join([*lines, "", ", ".join(f"{n:,} {s}{'s' * (n != 1)}" for n, s in totals)])


# detectron2's VOC evaluator takes the mean over all classes of a card.
_CLASS_WITHOUT_BOXES = {
    2007: "AP 0 for this class on this split, which the mean counts",
    2012: "AP 0 for this class on this split, which the mean counts; NaN once it is detected",
}


def quoted(name: str) -> str:
    """Returns a class's name, in quotes unless it is one plain word."""
    return name if re.fullmatch(r"[\w.+-]+", name) else repr(name)


def _printable(text: str) -> str:
    # Names from untrusted files: no control characters for the terminal, no novels.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:4000])
