"""AP of an exported student, and of the checkpoint that it came from."""

import contextlib
import io
import tempfile
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import COCOEvaluator, inference_on_dataset

from ..config import ConfigError
from ..data.cards import counted_detections
from ..data.class_names import dataset_class_names, names_or_numbers
from ..data.fields import coco_evaluator_fault
from ..data.files import read_coco_json
from ..data.mapper import CheckedMapper
from .deployed import KEYPOINTS, DeployedModel
from .student import load_student

Results = Dict[str, Dict[str, float]]
_PERSON = 17  # keypoints of COCO's person, whose sigmas pycocotools knows
_MOST = 10_000  # detections of an image: more than a model gives


class _Asked(NamedTuple):
    """What is evaluated beside boxes; the sigmas of the keypoints, if they aren't COCO's."""

    masks: bool
    keypoints: bool
    sigmas: List[float]


def evaluate_deployed(folder: str, dataset: str) -> Results:
    """COCO's measures of an exported ``torchscript`` or ``onnx`` file.

    Args:
        folder: that :func:`export_student` wrote.
        dataset: name of a registered data set.

    Returns:
        Such as ``{"bbox": {"AP": 41.2, ...}}``, with "segm" and "keypoints" where there are any.

    Raises:
        ConfigError: if the data set isn't registered, can't be evaluated, or its classes are known
            to be others.
        FileNotFoundError: if there is no such export.
        ValueError: if it can't be read.
    """
    model = DeployedModel(folder)
    info = model.info
    _check_classes(dataset, folder, info.classes)
    asked = _Asked(
        masks="masks" in info.outputs,
        keypoints=KEYPOINTS in info.outputs,
        sigmas=list(info.keypoint_sigmas),
    )
    return _evaluate(model, dataset, info.mapper(), asked)


def evaluate_checkpoint(
    checkpoint: str, dataset: str, config_file: str = "", overrides: Sequence[str] = ()
) -> Results:
    """The same of a training checkpoint, in detectron2 on the CPU.

    Args:
        checkpoint, config_file, overrides: as for :func:`export_student`.
        dataset: name of a registered data set.

    Raises:
        ConfigError, FileNotFoundError, ValueError: as :func:`export_student`, and of the data set
            as :func:`evaluate_deployed`.
    """
    student = load_student(checkpoint, config_file, overrides)
    cfg = student.cfg
    _check_classes(dataset, checkpoint, names_or_numbers(student.classes, cfg))
    asked = _Asked(cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON, list(cfg.TEST.KEYPOINT_OKS_SIGMAS))
    return _evaluate(student.model, dataset, student.mapper(), asked)


def compare(found: Results, wanted: Results, tolerance: float) -> List[str]:
    """Which AP differ by more than ``tolerance``, each in words."""
    return [
        f"{task} AP {found.get(task, {}).get('AP', float('nan')):.2f} instead of {aps['AP']:.2f}"
        for task, aps in wanted.items()
        if not abs(found.get(task, {}).get("AP", float("nan")) - aps["AP"]) <= tolerance
    ]


def dataset_records(dataset: str) -> List[dict]:
    """What a registered data set holds.

    Raises:
        ConfigError: if it isn't registered.
    """
    if dataset not in DatasetCatalog:
        known = ", ".join(name for name in DatasetCatalog if name.startswith("crosskd"))
        raise ConfigError(
            f"--dataset {dataset!r} is not registered; give its card by --card, or --checkpoint "
            f"with the --config-file whose code registers it. Built in: {known}"
        )
    return DatasetCatalog.get(dataset)


def _check_classes(dataset: str, model: str, ours: Sequence[str]) -> None:
    """Refuse another number of classes than the model's, and other names if it has any."""
    theirs = dataset_class_names(dataset)
    is_named = list(ours) != [str(i) for i in range(len(ours))]
    if not theirs or list(theirs) == list(ours) or (len(theirs) == len(ours) and not is_named):
        return
    its = ", ".join(ours) if is_named else f"{len(ours)}, whose names aren't known"
    raise ConfigError(
        f"--dataset {dataset!r} has the classes {', '.join(theirs)}, but {model} {its}"
    )


def _evaluate(
    model: Callable, dataset: str, mapper: Callable[[dict], Any], asked: _Asked
) -> Results:
    loader = build_detection_test_loader(
        dataset_records(dataset), mapper=CheckedMapper(mapper, check_image=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluator = _evaluator(dataset, folder, asked)
        with contextlib.redirect_stdout(io.StringIO()):  # of pycocotools
            return inference_on_dataset(model, loader, evaluator)


def _evaluator(dataset: str, folder: str, asked: _Asked) -> COCOEvaluator:
    """A data set without a JSON of its own is converted into this temporary folder."""
    metadata = MetadataCatalog.get(dataset)
    is_converted = metadata.get("json_file") is None
    options = dict(distributed=False, output_dir=folder, kpt_oks_sigmas=asked.sigmas)
    options["max_dets_per_image"] = counted_detections(dataset, _MOST)
    evaluator = COCOEvaluator(dataset, **options)
    path = metadata.json_file
    if is_converted:
        del metadata.json_file  # where detectron2 has noted it for later evaluations
    content = read_coco_json(path)
    fault = "there are no annotations in it"
    if content.get("annotations"):
        keypoints = asked.keypoints and (len(asked.sigmas) or _PERSON)
        fault = coco_evaluator_fault(content, masks=asked.masks, keypoints=keypoints)
    if fault:
        place = "" if is_converted else f"{path}: "
        raise ConfigError(f"--dataset {dataset!r} can't be evaluated: {place}{fault}")
    return evaluator
