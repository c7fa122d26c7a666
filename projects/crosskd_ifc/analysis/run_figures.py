"""The curves of one training, as SVG."""

import io
from typing import Dict, List, Optional, Sequence

from ..common.plotting import literal, pyplot
from .run_record import RunRecord

_WIDTH, _HEIGHT = 4.6, 2.9  # inches of a panel


def draw_losses(record: RunRecord) -> str:
    """Detection losses beside distillation losses, as logged: with their weights."""
    losses = [key for key in record.keys() if "loss" in key and key != "total_loss"]
    groups = {
        "detection losses": [key for key in losses if not key.endswith("_kd")],
        "distillation losses": [key for key in losses if key.endswith("_kd")],
    }
    return _draw(record, {title: keys for title, keys in groups.items() if keys})


def draw_evaluations(record: RunRecord, teacher: Dict[str, Optional[float]]) -> str:
    """AP of the student over the training, with the teacher's as a line; "" without evaluations.

    Args:
        teacher: task ("bbox", "segm") -> its AP, None where it isn't known.
    """
    tasks = [task for task in record.tasks() if record.evaluations(task)]
    if not tasks:
        return ""
    figure, axes = _panels(len(tasks))
    for axis, task in zip(axes, tasks):
        axis.plot(*zip(*record.evaluations(task)), marker="o", label="student")
        if teacher.get(task) is not None:
            axis.axhline(teacher[task], color="0.4", linestyle="--", label="teacher")
        axis.set_title(f"AP ({task}) on {literal(record.cfg.DATASETS.TEST[0])}", fontsize=10)
        _finish(axis)
        axis.set_ylim(top=max(axis.get_ylim()[1], 1))  # less than a point looks like less
    return _to_svg(figure)


def draw_statistics(record: RunRecord) -> str:
    """What the distillation logs as ``crosskd/...``: agreements together, the others one by one; ""
    if there is nothing."""
    keys = [key for key in record.keys() if key.startswith("crosskd/") and record.series(key)]
    together = [key for key in keys if "agreement" in key.split("/")[1].split("_")]
    panels: Dict[str, List[str]] = {"agreement with the teacher's class": together}
    panels.update({_short(key): [key] for key in keys if key not in together})
    return _draw(record, {title: found for title, found in panels.items() if found})


def _draw(record: RunRecord, panels: Dict[str, Sequence[str]]) -> str:
    if not panels:
        return ""
    figure, axes = _panels(len(panels))
    for axis, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            points = record.series(key)
            if points:
                marker = "o" if len(points) < 3 else ""
                axis.plot(*zip(*points), marker=marker, label=literal(_short(key)))
        axis.set_title(literal(title), fontsize=10)
        _finish(axis, legend=len(keys) > 1)
    return _to_svg(figure)


def _short(key: str) -> str:
    return key.split("/")[-1]


def _panels(count: int):
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = pyplot().subplots(
        rows,
        columns,
        figsize=(_WIDTH * columns, _HEIGHT * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def _finish(axis, *, legend: bool = True) -> None:
    axis.set_xlabel("iteration", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_xlim(left=0)
    low, high = axis.get_ylim()
    axis.set_ylim(bottom=min(low, 0) if low < 0 else 0, top=high)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8)


def _to_svg(figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot().close(figure)
    return text.getvalue()
