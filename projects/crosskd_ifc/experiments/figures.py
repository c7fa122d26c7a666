"""Figures of a comparison: learning curves with their spread, and paired differences."""

from typing import Dict, List, Set

import numpy as np

from ..common.plotting import literal, pyplot, save_figure, set_title
from .protocol import TEACHER
from .statistics import Difference
from .tables import Section, Table

_COLUMNS = 3  # of panels


def has_curves(table: Table) -> bool:
    """Whether a student was evaluated more than once in its training."""
    students = (name for name in table.arms if name != TEACHER)
    runs = (run for name in students for found in table.current(name).values() for run in found)
    return any(len(run["curve"]) > 1 for run in runs)


def draw_curves(table: Table, path: str) -> None:
    """Plot AP over iterations, as PNG: a panel for the main arms and one for each group of
    ablations, lines the mean over seeds, bands from the lowest to the highest seed."""
    plt = pyplot()
    sections = table.sections()
    columns = min(len(sections), _COLUMNS)
    rows = -(-len(sections) // columns)
    size = (max(5.4 * columns, 7), 4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(sections) :]:
        axis.set_axis_off()
    for axis, section in zip(axes.flat, sections):
        _curves(axis, table, section)
    content = table.content
    sound = " that haven't diverged" if content.get("stability") else ""
    set_title(
        figure,
        literal(f"{content['title']}\nAP on {content['validation'] or content['test']}: ")
        + f"mean of the seeds{sound}; bands: lowest to highest",
    )
    save_figure(figure, path)


def draw_differences(table: Table, path: str) -> bool:
    """Plot all paired differences as PNG: a row of panels for each section, a panel for each arm
    that differences are taken to. Returns whether there are any."""
    plt = pyplot()
    rows = []
    for section in table.sections():
        found: Dict[str, Dict[str, Difference]] = {}
        for arm, other, difference in table.differences(section):
            found.setdefault(other, {})[arm] = difference
        names = [arm for arm in section.arms if any(arm in by_arm for by_arm in found.values())]
        if found:
            order = [other for other in section.references if other in found]
            rows.append((section.group or "main arms", names, {n: found[n] for n in order}))
    if not rows:
        return False
    heights = [0.36 * len(names) + 0.75 for _, names, _ in rows]
    columns = max(len(found) for _, _, found in rows)
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(2.4 + 3.4 * columns, sum(heights) + 1.0),
        height_ratios=[len(names) + 0.6 for _, names, _ in rows],
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    panels: Dict[str, List] = {}
    for line, (title, names, found) in zip(axes, rows):
        for axis in line[len(found) :]:
            axis.set_axis_off()
        for axis, (other, by_arm) in zip(line, found.items()):
            _forest(axis, names, by_arm)
            axis.set_title(f"minus {other}", fontsize=9)
            panels.setdefault(other, []).append(axis)
        line[0].set_yticks(range(len(names)), names, fontsize=9)
        line[0].set_ylim(len(names) - 0.4, -0.6)
        line[0].annotate(
            literal(title),
            (0, 1),
            (-8, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=10,
            weight="bold",
        )
    for same in panels.values():  # one scale for each arm that is compared with
        low, high = zip(*(axis.get_xlim() for axis in same))
        for axis in same:
            axis.set_xlim(min(low), max(high))
    set_title(
        figure,
        literal(f"{table.content['title']}\nDifference of AP on {table.content['test']}")
        + ", paired by seed\n"
        + "mean with 95 % interval (of two seeds: cut at the border); circles: each seed",
    )
    save_figure(figure, path)
    return True


def _curves(axis, table: Table, section: Section) -> None:
    others = [name for name in section.references if name not in section.arms]
    grey = {name: str(0.25 + 0.5 * i / max(len(others), 1)) for i, name in enumerate(others)}
    seeds = {seed for name in section.arms for seed in table.runs[name]}
    for name in [*others, *section.arms]:
        curves = _common_points(table, name, seeds)
        if not curves:
            continue
        iterations, values = np.array(curves["iterations"]), np.array(curves["AP"])
        if name == TEACHER:  # its schedule is another one
            final = values[:, -1].mean()
            axis.axhline(final, color="0.4", linestyle=":", label=f"{name}, at its end")
            continue
        style = dict(color=grey[name], linestyle="--") if name in grey else {}
        (line,) = axis.plot(iterations, values.mean(0), marker="o", ms=4, label=name, **style)
        if len(values) > 1 and name not in grey:
            band = values.min(0), values.max(0)
            axis.fill_between(iterations, *band, color=line.get_color(), alpha=0.12, linewidth=0)
    axis.set_title(literal(section.group or "main arms"), fontsize=11)
    axis.set_xlabel("iteration")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _common_points(table: Table, name: str, seeds: Set[int]) -> Dict[str, List]:
    """{"iterations", "AP" (one list for each of ``seeds``, the mean of its replicates)} at the
    iterations that all have that haven't diverged."""
    found = [
        [run for run in runs if "diverged" not in run]
        for seed, runs in table.current(name).items()
        if seed in seeds
    ]
    found = [runs for runs in found if runs]
    curves = [[dict(map(tuple, run["curve"])) for run in runs] for runs in found]
    common = sorted(set.intersection(*(set(c) for each in curves for c in each))) if curves else []
    if not common:
        return {}
    means = [[float(np.mean([c[i] for c in each])) for i in common] for each in curves]
    return {"iterations": common, "AP": means}


def _forest(axis, names: List[str], by_arm: Dict[str, Difference]) -> None:
    axis.axvline(0, color="0.5", linewidth=1)
    shown = [0.0]
    for y, name in enumerate(names):
        if name not in by_arm:
            continue
        found = by_arm[name]
        values = list(found.values.values())
        axis.plot(values, [y + 0.3] * len(values), "o", mfc="none", mec="0.4", ms=3.5, mew=0.8)
        shown += values
        if found.interval:
            axis.plot(found.interval, [y, y], "-", color="C0", linewidth=1.8)
            # That of two seeds, 25 standard errors wide, would hide all others: it is cut.
            shown += found.interval if len(values) > 2 else ()
        axis.plot([found.mean], [y], "D", color="C0", ms=5.5)
    margin = 0.06 * (max(shown) - min(shown)) + 0.1
    axis.set_xlim(min(shown) - margin, max(shown) + margin)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
