"""A small generated data set in COCO format, to try everything without downloading anything.

The pictures are those of :mod:`.shapes_drawing`; this module writes them to disk when
they are first needed, and registers the splits under fixed names.
"""

import concurrent.futures
import functools
import json
import logging
import multiprocessing
import os
import shutil
from typing import Any, Iterator, List, Mapping, Optional, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from ..common.files import locked
from .shapes_drawing import CLASSES, SPLIT_IDS, render

# A second label set for the same objects, to distil from a teacher of other classes.
COARSE_CLASSES = {
    "disk": ("striped_disk", "dotted_disk"),
    "arc": ("ring", "crescent"),
    "polygon": ("triangle", "cross"),
    "star": ("star5", "star6"),
}

NUM_IMAGES = {"train": 1200, "val": 200, "test": 300}
# For decisions that need more images than that: other pictures, to choose and to test on.
LARGE = {"num_images": {"val": 1000, "test": 2500}, "seed": 1}
# Too few to learn from, to see whether everything runs.
FEW = {"num_images": {"train": 48, "test": 16}}
# A further data set for GPUs: larger pictures, more to learn from.
AT_256 = {"num_images": {"train": 4000, "test": 2000}, "image_size": 256, "seed": 2}

_PER_PROCESS = 250  # images that are worth the start of a process
VERSION = 1  # part of the folder's name: raise it whenever the pictures change

logger = logging.getLogger(__name__)


def _parameters(num_images: Optional[Mapping[str, int]], image_size: int, seed: int) -> dict:
    """Checks the parameters of a data set; returns what its info file holds."""
    num_images = dict(NUM_IMAGES if num_images is None else num_images)
    if not num_images or not set(num_images) <= set(SPLIT_IDS) or min(num_images.values()) < 1:
        raise ValueError(f"num_images: {list(SPLIT_IDS)} -> at least 1, given {num_images}")
    if image_size < 64 or seed < 0:
        raise ValueError(f"image_size >= 64 and seed >= 0, given {image_size} and {seed}")
    num_images = {split: num_images[split] for split in SPLIT_IDS if split in num_images}
    return {"version": VERSION, "seed": seed, "image_size": image_size, "num_images": num_images}


def _write(root: str, parameters: dict) -> None:
    """Writes all files of a data set into the new folder ``root``."""
    size, counts = parameters["image_size"], parameters["num_images"]
    PathManager.mkdirs(os.path.join(root, "annotations"))
    for split, count in counts.items():
        PathManager.mkdirs(os.path.join(root, split))
        images, annotations = [], []
        rendered = _rendered(parameters["seed"], split, count, size)
        rendered = tqdm(rendered, desc=split, total=count, unit=" images", disable=None)
        for i, (image, objects) in enumerate(rendered):
            name = f"{i + 1:06d}.png"
            with PathManager.open(os.path.join(root, split, name), "wb") as f:
                Image.fromarray(image).save(f, "PNG")
            images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
            for obj in objects:  # ids start at 1: the COCO evaluation takes 0 for "no match"
                annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **obj})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        coco = {"info": parameters, "images": images, "annotations": annotations}
        with PathManager.open(os.path.join(root, "annotations", f"{split}.json"), "w") as f:
            json.dump({**coco, "categories": categories}, f)
    with PathManager.open(os.path.join(root, "info.json"), "w") as f:
        json.dump(parameters, f, indent=1)


def _rendered(seed: int, split: str, count: int, size: int) -> Iterator[Tuple[Any, List[dict]]]:
    """What :func:`render` gives for each image, in order; many on several processes, if there are
    the cores."""
    processes = min((os.cpu_count() or 1) // 2, count // _PER_PROCESS)
    one = functools.partial(render, seed, split, image_size=size)
    if processes < 2:
        yield from map(one, range(count))
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(one, range(count), chunksize=25)


def _is_complete(root: str, parameters: dict) -> bool:
    """Whether ``root`` holds this data set; False if it doesn't exist, ValueError if it differs."""
    if not PathManager.exists(root):
        return False
    advice = f"Remove the folder to have it generated again, or choose another one: {root}"
    try:
        with PathManager.open(os.path.join(root, "info.json")) as f:
            found = json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"Not a generated shapes data set (info.json: {e}). {advice}") from e
    if found != parameters:
        raise ValueError(f"Generated with {found}, wanted is {parameters}. {advice}")
    return True


def generate(
    root: str,
    *,
    num_images: Optional[Mapping[str, int]] = None,
    image_size: int = 128,
    seed: int = 0,
) -> None:
    """Makes sure that the folder ``root`` holds the data set with these parameters.

    The files are ``<split>/<number>.png``, ``annotations/<split>.json`` and ``info.json``. An
    existing folder is checked and left as it is. Several processes may call this at once: one
    works, the others wait. The folder appears complete or not at all.

    Args:
        root: a local folder; its parents are made where missing.
        num_images: images per split (train, val, test); default ``NUM_IMAGES``.
        image_size: height and width of each image in pixels, at least 64.
        seed: not negative; the same seed gives the same bytes (with the same versions of
            numpy, OpenCV and Pillow).

    Raises:
        ValueError: wrong parameters, or ``root`` holds something else.
    """
    root = os.path.abspath(root)
    parameters = _parameters(num_images, image_size, seed)
    if _is_complete(root, parameters):  # without the lock: the folder may be read-only
        return
    with locked(root, "let no other process make these pictures at the same time"):
        if _is_complete(root, parameters):
            return
        partial = root + ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # left behind by an interrupted run
        logger.info("Generating %d images in %s", sum(parameters["num_images"].values()), root)
        _write(partial, parameters)
        os.rename(partial, root)


def register_shapes(
    name_prefix: str = "crosskd_shapes",
    *,
    root: Optional[str] = None,
    num_images: Optional[Mapping[str, int]] = None,
    image_size: int = 128,
    seed: int = 0,
) -> List[str]:
    """Registers ``<name_prefix>_<split>`` for each split; writes nothing yet.

    The files of all splits are generated when one of them is first loaded (``DatasetCatalog.get``;
    build the data loader before a ``COCOEvaluator``, which opens the annotation file at once).

    Args:
        root: the folder, as in :func:`generate`; default is a folder named by the parameters in
            ``$DETECTRON2_DATASETS``, which is read now, as for detectron2's own data sets.
        num_images, image_size, seed: as in :func:`generate`.

    Returns:
        the registered names.
    """
    parameters = _parameters(num_images, image_size, seed)
    num_images = parameters["num_images"]
    if root is None:
        counts = "-".join(f"{split}{count}" for split, count in num_images.items())
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        root = os.path.join(root, f"crosskd_shapes-v{VERSION}-{counts}-{image_size}px-seed{seed}")
    names = []
    for split in num_images:
        name = f"{name_prefix}_{split}"
        json_file = os.path.join(root, "annotations", f"{split}.json")
        image_root = os.path.join(root, split)

        def load(name=name, json_file=json_file, image_root=image_root):
            generate(root, num_images=num_images, image_size=image_size, seed=seed)
            return load_coco_json(json_file, image_root, name)

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
        )
        names.append(name)
    return names


def register_coarse_shapes(name_prefix: str = "crosskd_shapes") -> List[str]:
    """Registers ``<name_prefix>_coarse_<split>``, the same images and boxes under the four classes
    of ``COARSE_CLASSES``.

    Args:
        name_prefix: of data sets registered by :func:`register_shapes`.

    Returns:
        the registered names.
    """
    coarse = [
        next(i for i, members in enumerate(COARSE_CLASSES.values()) if fine in members)
        for fine in CLASSES
    ]
    names = []
    for split in SPLIT_IDS:
        fine_name = f"{name_prefix}_{split}"
        if fine_name not in DatasetCatalog:
            continue

        def load(fine_name=fine_name):
            dicts = DatasetCatalog.get(fine_name)
            for annotation in (a for d in dicts for a in d["annotations"]):
                annotation["category_id"] = coarse[annotation["category_id"]]
            return dicts

        name = f"{name_prefix}_coarse_{split}"
        DatasetCatalog.register(name, load)
        # No json_file: the evaluator writes one from the dicts.
        MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=list(COARSE_CLASSES))
        names.append(name)
    return names
