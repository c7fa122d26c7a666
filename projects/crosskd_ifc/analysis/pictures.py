"""Pictures of what a trained student and its teacher make of given images, from a config."""

import os
import random
from typing import Dict, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from ..common.errors import one_line
from ..common.files import claim_output
from ..config import ConfigError, distillation_requested, teacher_configs
from ..data.class_names import class_names, class_names_or_numbers
from ..data.mapper import SampleError, build_mapper
from ..distillation.teacher import Teacher
from ..modeling.attach import attach_teacher
from ..modeling.classes import num_classes
from ..training.preflight import check_evaluation_config, check_weights
from ..training.preflight_data import check_classes
from ..weights.strict import load_strictly
from .detections import COLUMNS, compare_detections, spread_evenly
from .feature_maps import compare_features

MAX_IMAGES = 100  # a row each; matplotlib refuses pictures that are much higher


def inspect_pair(
    cfg: CfgNode,
    out: str,
    *,
    images: Sequence[str] = (),
    number: int = 4,
    seed: Optional[int] = None,
    names: Sequence[str] = (),
    threshold: float = 0.5,
    force: bool = False,
) -> List[str]:
    """Write a picture of detections (:func:`compare_detections`) and one of feature differences
    (:func:`compare_features`).

    Args:
        cfg: the student's config, with its teacher and with trained weights in MODEL.WEIGHTS.
        out: the folder to write to, or a .png file: ``x.png`` makes ``x_detections.png`` and
            ``x_features.png``.
        images: image files; if there are none, images of the first data set in DATASETS.TEST are
            taken, and their ground truth is drawn.
        number: how many of the data set, spread evenly over it.
        seed: take them by chance instead.
        names: take those of these file names, with or without folder and suffix.
        threshold: detections below this score aren't drawn.
        force: whether existing pictures may be replaced.

    Returns:
        The files written, detections first.

    Raises:
        ConfigError: if the config, a data set, an image, the weights or ``out`` can't be used.
    """
    _check(cfg)
    if images:
        records = _from_files(images)
    else:
        records = choose_records(load_records(cfg), number, seed=seed, names=names)
    source = "--images" if images else f"data set {cfg.DATASETS.TEST[0]!r}"
    inputs = load_inputs(cfg, records, source)
    detections, features = _prepare_output(out, images, force)

    student = build_model(cfg)
    teacher = attach_teacher(student, cfg)  # first: it adds the adapters, if there are any
    load_strictly(student, cfg.MODEL.WEIGHTS)
    compare_features(student, inputs, features)
    known = all("annotations" in record for record in records)
    compare_detections(
        student,
        inputs,
        names_by_column(cfg, teacher),
        detections,
        annotations=[record["annotations"] for record in records] if known else None,
        threshold=threshold,
    )
    return [detections, features]


def load_inputs(cfg: CfgNode, records: Sequence[dict], source: str) -> List[dict]:
    """Images as detectron2's test loader hands them to the student.

    Args:
        cfg: the student's config.
        records: dataset dicts, at least with "file_name".
        source: where they are from, for the error.

    Returns:
        The dicts with the resized "image", a (3, H, W) uint8 tensor in the order of INPUT.FORMAT,
        and its original "height" and "width"; without "annotations".

    Raises:
        ConfigError: naming the first file that training would refuse, too.
    """
    mapper = build_mapper(cfg, is_train=False)
    try:
        return [mapper(record) for record in records]
    except SampleError as error:
        raise ConfigError(f"{source}: {error}") from error


def names_by_column(cfg: CfgNode, teacher: Teacher) -> Dict[str, Sequence[str]]:
    """The names of the classes in each column of the picture of detections.

    Numbers where no data set tells the names. A teacher whose names aren't known has the student's,
    unless ``TEACHER.CLASS_MAP`` says that its classes are others.

    Args:
        cfg: the student's config.
        teacher: the attached teacher.
    """
    ours, theirs = class_names_or_numbers(cfg), class_names(teacher.cfg, cards=True)
    if theirs is None:
        has_others = teacher_configs(cfg)[0][1].MODEL.CROSSKD.TEACHER.CLASS_MAP
        theirs = list(map(str, range(num_classes(teacher.model)))) if has_others else ours
    return {column: theirs if column in ("teacher", "cross-head") else ours for column in COLUMNS}


def _check(cfg: CfgNode) -> None:
    """Check what can be checked before data and models, and register the dataset cards."""
    if not distillation_requested(cfg):
        kd = cfg.MODEL.CROSSKD
        raise ConfigError(
            "the config has no teacher to compare with: MODEL.CROSSKD.TEACHER.CONFIG_FILE is "
            f"{kd.TEACHER.CONFIG_FILE!r} and MODEL.CROSSKD.ENABLED {kd.ENABLED}"
        )
    check_evaluation_config(cfg)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty; give the student's checkpoint")
    check_weights(cfg)


def _from_files(images: Sequence[str]) -> List[dict]:
    if len(images) > MAX_IMAGES:
        raise ConfigError(f"--images: {len(images)} files; {MAX_IMAGES} is the most")
    return [{"file_name": path} for path in images]


def load_records(cfg: CfgNode) -> List[dict]:
    """The dataset dicts of the first data set in DATASETS.TEST.

    Raises:
        ConfigError: if there is none, it can't be loaded or is empty, or its classes aren't those
            of the training.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; give --images or --dataset")
    name = cfg.DATASETS.TEST[0]
    try:
        records = DatasetCatalog.get(name)
    except Exception as error:  # a data set's loader is anyone's code
        raise ConfigError(f"data set {name!r} can't be loaded: {one_line(error)}") from error
    if not records:
        raise ConfigError(f"data set {name!r} has no images")
    check_classes(cfg, evaluation=True)  # the ground truth is named as the model's classes are
    return records


def choose_records(
    records: Sequence[dict],
    number: int,
    *,
    seed: Optional[int] = None,
    names: Sequence[str] = (),
) -> List[dict]:
    """Some images of a data set: those of ``names``, or ``number`` by chance, or evenly spread.

    Raises:
        ConfigError: for a number that can't be drawn, or a name that no image or several have.
    """
    if len(names) > MAX_IMAGES:
        raise ConfigError(f"--names: {len(names)} images; {MAX_IMAGES} is the most")
    if names:
        return [_named(records, name) for name in names]
    if not 1 <= number <= MAX_IMAGES:
        raise ConfigError(f"--num is {number}; it must be from 1 to {MAX_IMAGES}")
    if seed is None:
        return [records[i] for i in spread_evenly(number, len(records))]
    return random.Random(seed).sample(list(records), min(number, len(records)))


def _named(records: Sequence[dict], name: str) -> dict:
    found = []
    for record in records:
        path = record["file_name"]
        base = os.path.basename(path)
        if name in (path, base, os.path.splitext(base)[0]):
            found.append(record)
    if len(found) != 1:
        what = f"{len(found)} images are" if found else "no image of the data set is"
        example = os.path.basename(records[0]["file_name"])
        raise ConfigError(f"--names: {what} called {name!r}; a name is a file's, such as {example}")
    return found[0]


def _prepare_output(out: str, images: Sequence[str], force: bool) -> List[str]:
    """The two files to write, in a folder that is there."""
    stem, extension = os.path.splitext(out)
    prefix = f"{stem}_" if extension == ".png" else os.path.join(out, "")
    files = [f"{prefix}{name}.png" for name in ("detections", "features")]
    for file in files:
        claim_output(file, sources=images, force=force, option="--output")
    return files
