"""AP of an exported student, and of the checkpoint that it came from."""

import contextlib
import io
import tempfile
from typing import Any, Callable, Dict, List, Sequence

from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import COCOEvaluator, inference_on_dataset

from ..config import ConfigError
from ..data.class_names import dataset_class_names
from ..data.mapper import CheckedMapper
from .deployed import DeployedModel
from .student import load_student

Results = Dict[str, Dict[str, float]]


def evaluate_deployed(folder: str, dataset: str) -> Results:
    """COCO's measures of an exported ``torchscript`` or ``onnx`` file.

    Args:
        folder: that :func:`export_student` wrote.
        dataset: name of a registered data set.

    Returns:
        Such as ``{"bbox": {"AP": 41.2, ...}}``, with "segm" and "keypoints" where there are any.

    Raises:
        ConfigError: if the data set isn't registered, or its classes are known to be others.
        FileNotFoundError: if there is no such export.
    """
    model = DeployedModel(folder)
    ours = list(model.info.classes)
    theirs = dataset_class_names(dataset, load=True) if dataset in DatasetCatalog else None
    is_known = theirs and ours != [str(i) for i in range(len(ours))]
    if is_known and list(theirs) != ours:
        raise ConfigError(
            f"--dataset {dataset!r} has the classes {', '.join(theirs)}, but {folder} "
            f"{', '.join(ours)}"
        )
    return _evaluate(model, dataset, model.info.mapper())


def evaluate_checkpoint(
    checkpoint: str, dataset: str, config_file: str = "", overrides: Sequence[str] = ()
) -> Results:
    """The same of a training checkpoint, in detectron2 on the CPU.

    Args:
        checkpoint, config_file, overrides: as for :func:`export_student`.
        dataset: name of a registered data set.

    Raises:
        ConfigError, FileNotFoundError, ValueError: as :func:`export_student`.
    """
    student = load_student(checkpoint, config_file, overrides)
    return _evaluate(student.model, dataset, DatasetMapper(student.cfg, is_train=False))


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
            f"--dataset {dataset!r} is not registered; give its card by --card. Built in: {known}"
        )
    return DatasetCatalog.get(dataset)


def _evaluate(model: Callable, dataset: str, mapper: Callable[[dict], Any]) -> Results:
    loader = build_detection_test_loader(
        dataset_records(dataset), mapper=CheckedMapper(mapper, check_image=True)
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluator = _evaluator(dataset, folder)
        with contextlib.redirect_stdout(io.StringIO()):  # of pycocotools
            return inference_on_dataset(model, loader, evaluator)


def _evaluator(dataset: str, folder: str) -> COCOEvaluator:
    """A data set without a JSON of its own is converted into this temporary folder."""
    metadata = MetadataCatalog.get(dataset)
    is_converted = metadata.get("json_file") is None
    evaluator = COCOEvaluator(dataset, distributed=False, output_dir=folder)
    if is_converted:
        del metadata.json_file  # where detectron2 has noted it for later evaluations
    return evaluator
