"""A checked dataset card."""

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Tuple


@dataclass(frozen=True)
class Card:
    """A checked dataset card. Paths are absolute; nothing but the card itself has been read.

    Attributes:
        path: the card file, or "" for a data set that is registered without one.
        name: data set names are ``<name>_<split>``.
        format: "voc" or "coco".
        root: the data set's folder.
        splits: split -> name of ImageSets/Main/<x>.txt (voc), or {"json": path, "images": path}.
        classes: class names in the order of their ids; None: as in the json (coco only).
        evaluator: "coco" or "pascal_voc".
        year: 2007 (11-point AP) or 2012; None where no VOC evaluator needs it.
    """

    path: str
    name: str
    format: str
    root: str
    splits: Mapping[str, Any]
    classes: Optional[Tuple[str, ...]]
    evaluator: str
    year: Optional[int] = None
