"""Learning curves of runs, from their ``metrics.json``."""

import json
import logging
import math
import re
from typing import List, Mapping

from detectron2.utils.file_io import PathManager

from ..common.plotting import literal, pyplot, save_figure

logger = logging.getLogger(__name__)


def read_metrics(path: str) -> List[dict]:
    """The lines of a run's ``metrics.json``; a line that is still being written is left out."""
    lines = []
    with PathManager.open(path) as f:
        for line in f:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                logger.debug(f"{path}: incomplete line left out")
    return lines


def ap_or_zero(value: float) -> float:
    """An AP of an evaluation; detectron2 says NaN where a model detects nothing at all."""
    return 0.0 if math.isnan(value) else value


def plot_curves(runs: Mapping[str, str], path: str, *, title: str) -> None:
    """Plot the learning curves and the distillation losses of several runs, as PNG.

    Args:
        runs: label -> ``metrics.json`` of the run. One without distillation losses appears in the
            learning curves only.
        path: file to write.
        title: a line above the plots.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    panels = {
        "bbox/AP": "AP on the test set",
        "loss_cls": "classification loss (ground truth)",
        "loss_cls_kd": "classification loss (distillation)",
        "loss_box_reg_kd": "box loss (distillation)",
    }
    for i, (label, file) in enumerate(runs.items()):
        lines = read_metrics(file)
        for axis, key in zip(axes, panels):
            values = ((line["iteration"], _stages(line, key)) for line in lines)
            points = [(iteration, sum(found)) for iteration, found in values if found]
            if points:
                marker = "o" if key == "bbox/AP" else ""
                axis.plot(*zip(*points), marker=marker, label=literal(label), color=f"C{i}")
    for axis, name in zip(axes, panels.values()):
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("iteration")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=9)
    figure.suptitle(literal(title))
    save_figure(figure, path)


def _stages(line: dict, key: str) -> List[float]:
    """The value of a key, or those of the stages of a Cascade R-CNN."""
    return [value for name, value in line.items() if re.sub(r"_stage\d+", "", name) == key]
