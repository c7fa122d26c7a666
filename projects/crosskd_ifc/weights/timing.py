"""How fast detectors are, exported or not, measured in turns on one machine."""

import statistics
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch

from .deployed import DeployedModel
from .evaluating import dataset_records
from .student import load_student

_WARMUP = 3  # rounds; TorchScript compiles in the first ones


def load_detectors(
    exported: Sequence[str], checkpoints: Mapping[str, Tuple[Any, ...]], dataset: str, images: int
) -> Tuple[Dict[str, Callable[[], Any]], int]:
    """For each detector a function that runs it on the same images, one after the other, and how
    many images those are.

    What it does is what a user waits for once the resized images are there: normalisation, network,
    NMS, and boxes and masks in the size of the original image.

    Args:
        exported: folders that :func:`export_student` wrote.
        checkpoints: name -> arguments of :func:`load_student`; run in detectron2 on the CPU.
        dataset: name of a data set; code that comes with a checkpoint may register it.
        images: how many of it at most, the first ones.

    Raises:
        ConfigError, FileNotFoundError, ValueError: as :func:`evaluate_checkpoint`.
    """
    detectors: Dict[str, Any] = {}
    for name, arguments in checkpoints.items():
        student = load_student(*arguments)
        detectors[name] = student.model, student.mapper()
    records = dataset_records(dataset)[:images]
    for folder in exported:
        model = DeployedModel(folder)
        detectors[model.info.kind] = model, model.info.mapper()
    runners = {n: _runner(model, list(map(m, records))) for n, (model, m) in detectors.items()}
    return runners, len(records)


@torch.no_grad()
def measure_in_turns(parts: Mapping[str, Callable[[], Any]], rounds: int) -> Dict[str, List[float]]:
    """Seconds of each part in each round. In a round each runs once, in changing order, so that
    what else the machine does falls on all alike."""
    names, seconds = list(parts), {name: [] for name in parts}
    for i in range(_WARMUP + rounds):
        names.append(names.pop(0))
        for name in names:
            start = time.perf_counter()
            parts[name]()
            if i >= _WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def images_per_second(seconds: Sequence[float], images: int) -> Dict[str, Any]:
    """:func:`median_and_quartiles` over rounds of ``images`` each."""
    return median_and_quartiles([images / x for x in seconds])


def median_and_quartiles(values: Sequence[float]) -> Dict[str, Any]:
    """The "median" and the "quartiles"."""
    quartiles = [values[0]] * 2
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")[::2]
    return {
        "median": round(statistics.median(values), 4),
        "quartiles": [round(x, 4) for x in quartiles],
    }


def _runner(model: Callable, inputs: Sequence[Dict[str, Any]]) -> Callable[[], Any]:
    return lambda: [model([x]) for x in inputs]
