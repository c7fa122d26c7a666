#!/usr/bin/env python
"""Two pictures of recorded results: what each way of distilling adds to the plain student, and what
combining layers adds to plain CrossKD.

Runs nothing:

    python benchmarks/gains/draw.py     # writes docs/images/gains.png and combining.png
"""

import json
import os
from typing import Dict

from crosskd_ifc.common.plotting import pyplot, save_figure
from crosskd_ifc.experiments.tables import Table

BENCHMARKS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGES = os.path.join(os.path.dirname(BENCHMARKS), "docs", "images")
COLORS = {"crosskd": "C0", "crosskd_ifc": "C3", "winner": "C3", "taps": "C3"}  # grey: all others
GAINS = {
    "shapes_faster_rcnn": "Faster R-CNN\nbuilt-in",
    "bccd_faster_rcnn": "Faster R-CNN\nphotos, 160x120",
    "bccd_faster_rcnn_640": "Faster R-CNN\nphotos, 640x480",
    "shapes_retinanet": "RetinaNet\nbuilt-in",
    "shapes_inherit": "Faster R-CNN, built-in\ninheriting start",
}
GAINS_ARMS = {  # of the results, from top to bottom
    "student_head": "prediction mimicking",
    "feature": "feature mimicking (PKD)",
    "crosskd": "plain CrossKD",
    "crosskd_ifc": "mean of taps",
}
COMBINING = {
    "decisive": "Faster R-CNN\nbuilt-in, 440 steps",
    "decisive_weight": "Faster R-CNN, 440 steps,\nother seeds",
    "decisive_long": "Faster R-CNN\nbuilt-in, 880 steps",
    "decisive_retinanet": "RetinaNet\nbuilt-in, 600 steps",
    "decisive_photos": "Faster R-CNN\nphotos",
}
COMBINING_ARMS = {
    "winner": "one loss per tap",
    "taps": "one loss per tap",  # RetinaNet's
    "crosskd_ifc": "one loss per tap",  # of decisive_weight
    "crosskd_ifc_half": "one loss per tap, weights halved",
    "second": "one loss per tap, and one for their mean",
    "ifc": "one loss for the mean of taps",
    "single": "fc1 alone",
    "crosskd_double": "plain CrossKD, weights doubled",
}


def read_tables(names) -> Dict[str, Table]:
    """Of the comparisons that have results, of all seeds that their contrasts were planned with."""
    tables = {}
    for name in names:
        path = os.path.join(BENCHMARKS, name, "results.json")
        if os.path.exists(path):
            with open(path) as f:
                content = json.load(f)
            table = Table(content)
            planned = zip(content.get("contrasts", ()), content.get("planned_seeds", ()))
            if all(len(table.scores(arm)) >= count for pair, count in planned for arm in pair):
                tables[name] = table
    return tables


def draw(name: str, titles: Dict[str, str], arms: Dict[str, str], other: str, label: str) -> None:
    """A panel for each comparison: the AP of each arm minus the other's.

    Args:
        name: of the picture.
        titles, arms: name of a comparison, or of an arm -> what to write.
        label: below the picture.
    """
    tables = read_tables(titles)
    run = [arm for arm in arms if any(table.runs.get(arm) for table in tables.values())]
    rows = list(dict.fromkeys(arms[arm] for arm in run))
    figure, axes = pyplot().subplots(
        *(1, len(tables)),
        figsize=(2 + 1.9 * len(tables), 2.9),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis, (comparison, table) in zip(axes[0], tables.items()):
        for arm in filter(table.runs.get, arms):
            found = table.difference(arm, other)
            y, color = rows.index(arms[arm]), COLORS.get(arm, "0.45")
            axis.plot(found.interval, [y, y], color=color, linewidth=2.2)
            axis.plot([found.mean], [y], "o", color=color, ms=6.5)
            values = list(found.values.values())
            axis.plot(values, [y + 0.27] * len(values), "|", color=color, ms=5, alpha=0.7)
        theirs = table.scores(other)
        if other == "student":
            teachers = table.scores("teacher")
            gap = sum(teachers.values()) / len(teachers) - sum(theirs.values()) / len(theirs)
            axis.axvline(gap, color="0.3", linewidth=1, linestyle=":")
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_title(f"{titles[comparison]}\nn = {len(theirs)}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=9)
    axes[0][0].set_yticks(range(len(rows)), rows)
    axes[0][0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel(f"{label}, with its 95 % interval; small marks: each seed", fontsize=9)
    save_figure(figure, os.path.join(IMAGES, name))


if __name__ == "__main__":
    gained = "AP more than the plain student (dotted: the teacher's)"
    draw("gains.png", GAINS, GAINS_ARMS, "student", gained)
    draw("combining.png", COMBINING, COMBINING_ARMS, "crosskd", "AP more than plain CrossKD")
