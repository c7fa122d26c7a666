#!/usr/bin/env python
"""What each way of distilling adds to the plain student, on all data sets in one picture.

Reads recorded results, runs nothing:

    python benchmarks/gains/draw.py     # writes benchmarks/gains/gains.png
"""

import json
import os

from crosskd_ifc.common.plotting import pyplot, save_figure
from crosskd_ifc.experiments.tables import Table

HERE = os.path.dirname(os.path.abspath(__file__))
ARMS = {  # of the results, from top to bottom
    "student_head": "prediction mimicking",
    "feature": "feature mimicking (PKD)",
    "crosskd": "plain CrossKD",
    "crosskd_ifc": "CrossKD-IFC",
}
COMPARISONS = {
    "shapes_faster_rcnn": "Faster R-CNN\nbuilt-in",
    "shapes_retinanet": "RetinaNet\nbuilt-in",
    "bccd_faster_rcnn": "Faster R-CNN\nphotos, 160x120",
    "bccd_faster_rcnn_640": "Faster R-CNN\nphotos, 640x480",
    "shapes_inherit": "Faster R-CNN, built-in\ninheriting start",
}


def read_table(name: str) -> Table:
    with open(os.path.join(HERE, "..", name, "results.json")) as f:
        return Table(json.load(f))


def draw(path: str) -> None:
    figure, axes = pyplot().subplots(
        1, len(COMPARISONS), figsize=(11, 2.9), sharey=True, layout="constrained"
    )
    for axis, (name, title) in zip(axes, COMPARISONS.items()):
        table = read_table(name)
        for y, arm in enumerate(ARMS):
            found = table.difference(arm, "student")
            color = {"crosskd": "C0", "crosskd_ifc": "C3"}.get(arm, "0.45")
            axis.plot(found.interval, [y, y], color=color, linewidth=2.2)
            axis.plot([found.mean], [y], "o", color=color, ms=6.5)
            values = list(found.values.values())
            axis.plot(values, [y + 0.27] * len(values), "|", color=color, ms=5, alpha=0.7)
        teacher = table.scores("teacher")
        plain = table.scores("student")
        gap = sum(teacher.values()) / len(teacher) - sum(plain.values()) / len(plain)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.axvline(gap, color="0.3", linewidth=1, linestyle=":")
        axis.set_title(f"{title}\nn = {len(plain)}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    axes[0].set_yticks(range(len(ARMS)), ARMS.values())
    axes[0].set_ylim(len(ARMS) - 0.4, -0.6)
    figure.supxlabel(
        "AP more than the plain student, with its 95 % interval; small marks: each seed; "
        "dotted: the teacher",
        fontsize=9,
    )
    save_figure(figure, path)


if __name__ == "__main__":
    draw(os.path.join(HERE, "gains.png"))
