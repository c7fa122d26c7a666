"""A dataset card for a folder of photos: its annotations as COCO json beside the card, split so
that photos that look alike stay together. The photos stay where they are, as they are."""

import contextlib
import json
import os
import random
import re
from collections import Counter
from reprlib import repr as short
from typing import Any, Dict, List, Optional, Sequence

import yaml
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from ..common.files import refuse_overwriting, replacing
from .card import load_card
from .files import IMAGE_FORMATS, read_json, read_yaml
from .layouts import MADE_HERE, Photo, PhotoFolder, made_here, read_folder
from .near_duplicates import MISSING, groups_of_alike, is_available, perceptual_hash

_NAMES = ("train", "val", "test")
_EXAMPLES = 3


def make_card(
    folder: str,
    output: str,
    *,
    split: str = "",
    layout: str = "",
    seed: int = 0,
    near_duplicates: bool = True,
    force: bool = False,
) -> str:
    """Looks at a folder of photos, and writes a dataset card and its json files.

    Args:
        folder: of photos and annotations in one of `layouts.LAYOUTS`.
        output: the card's file. Its json files lie in the folder <name>_annotations beside it.
        split: parts of train, val and test such as "0.8/0.1/0.1", or of train and val. "": as the
            folder's own lists say; 0.8/0.1/0.1 where it has none.
        layout: "" finds out.
        seed: of the split.
        near_duplicates: whether photos that look alike go into the same split.
        force: replace an existing card.

    Returns:
        What was found and written, for people.

    Raises:
        ValueError: naming the folder, or the option, and what to do.
        FileExistsError: the card exists, or json files that aren't its own are in its way.
    """
    stem = os.path.splitext(os.path.basename(output))[0]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", stem).lstrip("_.-")
    if not output.endswith((".yaml", ".yml")):
        raise ValueError(f"--output {output!r}: expected a file such as cells.yaml")
    if not name:
        raise ValueError(
            f"--output {output!r}: the data sets take the file's name, which needs a letter from A "
            "to Z or a digit, as in cells.yaml"
        )
    parts = _parts(split) if split else []
    refuse_overwriting(output, sources=(), force=force, option="--output")
    _refuse_to_replace_other_than_a_card(output)
    base = os.path.dirname(os.path.realpath(output))
    annotations = os.path.join(base, f"{name}_annotations")
    _refuse_foreign(annotations, os.path.basename(output))
    for place in (os.path.realpath(folder), base):
        if "$" in place:
            raise ValueError(f"{place}: a card takes '$' for an environment variable; rename it")
    found = read_folder(folder, layout)
    own = {photo.split for photo in found.photos} - {""}
    if found.lists and not own and not split:
        raise ValueError(
            f"{folder}: the split in {found.lists[0]} names no photo that is there; correct it, or "
            "give --split 0.8/0.1/0.1"
        )
    if split or not own:
        if near_duplicates and not is_available():
            raise ValueError(
                f"photos that look alike can't be kept in one split: {MISSING}; or give "
                "--ignore-near-duplicates"
            )
        how = split_photos(
            found, parts or _parts("0.8/0.1/0.1"), seed=seed, near_duplicates=near_duplicates
        )
    else:
        how = "as the folder's own lists say"
        if own == {"train"}:
            how += ", only train; --split 0.8/0.1/0.1 makes val and test"
        for photo in [photo for photo in found.photos if not photo.split]:
            found.tell("photo in none of the folder's lists, left out", photo.path)
        found.photos = [photo for photo in found.photos if photo.split]
    splits = {name: [p for p in found.photos if p.split == name] for name in _NAMES}
    splits = {name: photos for name, photos in splits.items() if photos}
    if "train" not in splits:
        raise ValueError(f"{folder}: its lists name no photo to train on; give --split 0.8/0.1/0.1")

    os.makedirs(annotations, exist_ok=True)
    near = found.root == base or found.root.startswith(base + os.sep)
    entries = {}
    written: Dict[str, str] = {}
    for split_name, photos in splits.items():
        path = os.path.join(annotations, f"{split_name}.json")
        written[path] = json.dumps(_coco(found, photos, os.path.basename(output)))
        path = os.path.relpath(path, found.root) if near else path
        entries[split_name] = {"json": path, "images": "."}
    card = {
        "name": name,
        "format": "coco",
        "root": os.path.relpath(found.root, base) if near else found.root,
        "splits": entries,
        "classes": found.classes,
    }
    header = f"# {len(found.photos)} photos, split {how}. Made from {found.layout.upper()}: after a"
    header += " change of\n# the annotations or photos, make it again.\n"
    text = header + yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    with contextlib.ExitStack() as stack:  # all or none: of two splits, photos could be in both
        for path, content in {os.path.realpath(output): text, **written}.items():
            file = stack.enter_context(replacing(path))
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())  # a full disk is told before one is replaced
    load_card(output)
    return f"{_describe(found, splits)}\nSplit: {how}\nWrote {output} and {annotations}/"


def _refuse_to_replace_other_than_a_card(path: str) -> None:
    """--force is for cards, not for a data.yaml or a config that has the card's name."""
    if not os.path.lexists(path):
        return
    try:
        content = read_yaml(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "splits" not in content:
        raise FileExistsError(f"{path} is no dataset card; move it, or give another --output")


def _refuse_foreign(folder: str, card: str) -> None:
    """Refuses to replace a json file that wasn't made for this card."""
    for path in (os.path.join(folder, f"{name}.json") for name in _NAMES):
        if not os.path.lexists(path):
            continue
        try:
            content = read_json(path)
        except ValueError:
            content = None
        if not made_here(content):
            raise FileExistsError(f"{path} wasn't made by init; move it, or give another --output")
        if content["info"].get("card", card) != card:
            other = content["info"]["card"]
            raise FileExistsError(f"{path} belongs to the card {other}; give another --output")


def split_photos(
    found: PhotoFolder, parts: Sequence[float], *, seed: int, near_duplicates: bool
) -> str:
    """Gives each photo its split; the same photos and seed give the same.

    Args:
        parts: of train, val and perhaps test.
        near_duplicates: whether photos that look alike stay together.

    Returns:
        How, in words.
    """
    groups = [[i] for i in range(len(found.photos))]
    how = f"{'/'.join(f'{x:g}' for x in parts)} by seed {seed}"
    if near_duplicates:
        progress = tqdm(found.photos, unit=" images", leave=False, disable=None)
        groups = groups_of_alike([_hash(photo.path) for photo in progress])
        together = sum(len(group) for group in groups if len(group) > 1)
        how += f", {together} photos that look alike kept together"
    random.Random(seed).shuffle(groups)
    names = _NAMES[: len(parts)]
    left = {name: part * len(found.photos) for name, part in zip(names, parts)}
    for group in sorted(groups, key=len, reverse=True):
        name = max(names, key=lambda name: left[name])
        left[name] -= len(group)
        for i in group:
            found.photos[i].split = name
    empty = [name for name in names if name not in {photo.split for photo in found.photos}]
    return how + (f"; none are left for {' and '.join(empty)}" if empty else "")


def _hash(path: str) -> Optional[object]:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return perceptual_hash(image)
    except Exception:  # of a damaged image; `check` says so
        return None


def _parts(text: str) -> List[float]:
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        parts = []
    good = len(parts) in (2, 3) and min(parts) > 0 and abs(sum(parts) - 1) < 1e-6
    if not good:
        raise ValueError(
            f"--split {text}: expected parts of train, val and test that sum to 1, such as "
            "0.8/0.1/0.1, or of train and val"
        )
    return parts


def _coco(found: PhotoFolder, photos: Sequence[Photo], card: str) -> Dict[str, Any]:
    ids = {name: i for i, name in enumerate(found.classes, 1)}
    images, annotations = [], []
    for number, photo in enumerate(photos, 1):
        width, height = photo.size
        file_name = os.path.relpath(photo.path, found.root)
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for thing in photo.things:
            record = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": ids[thing.name],
                "bbox": thing.box,
                "area": thing.area or thing.box[2] * thing.box[3],
                "iscrowd": 1 if thing.crowd else 0,
            }
            if thing.outline:
                record["segmentation"] = thing.outline
            annotations.append(record)
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return {"info": {**MADE_HERE, "card": card}, **content}


def _describe(found: PhotoFolder, splits: Dict[str, List[Photo]]) -> str:
    counts = {
        name: Counter(thing.name for photo in photos for thing in photo.things if not thing.crowd)
        for name, photos in splits.items()
    }
    rows = [["images", *map(len, splits.values())]]
    rows.append(["boxes", *(sum(counts[name].values()) for name in splits)])
    rows += [[f"  {short(name)}", *(counts[s][name] for s in splits)] for name in found.classes]
    lines = [f"{found.root}: {found.layout.upper()}, {len(found.classes)} classes", ""]
    lines += [tabulate(rows, ("", *splits), tablefmt="simple"), ""]
    for what, places in found.problems.items():
        lines.append(f"{what}: {len(places):,}")
        lines += [f"  {place[:300]}" for place in places[:_EXAMPLES]]
        lines += ["  ..."] if len(places) > _EXAMPLES else []
    return "\n".join(lines)
