"""What a report says of runs that diverge, where the protocol asks for it."""

from collections import defaultdict
from typing import Any, Dict, List

import numpy as np
from tabulate import tabulate

from .protocol import TEACHER
from .statistics import describe_sample, deviation_ratio
from .tables import Section, Table


def stability(table: Table, section: Section) -> List[str]:
    """How often the students of a section diverge, and how much the AP of the others varies; lines
    of the report."""
    arms = [arm for arm in section.arms if arm != TEACHER]
    runs = {
        arm: [run for found in table.current(arm).values() for run in found]
        for arm in dict.fromkeys([*arms, *section.references])
    }
    ended = [run["AP"] for arm in arms for run in runs[arm] if "diverged" not in run]
    if not any(runs[arm] for arm in arms):
        return []
    least = float(np.median(ended)) / 3 if ended else 0.0
    sound = {
        arm: [run for run in found if "diverged" not in run and run["AP"] >= least]
        for arm, found in runs.items()
    }
    rows = []
    for arm in arms:
        scores = [run["AP"] for run in sound[arm]]
        spread = describe_sample(scores).deviation if scores else None
        ratios = []
        for other in table.arms[arm]["versus"]:
            ratio = deviation_ratio(*(_by_teacher(sound.get(x, [])) for x in (arm, other)))
            if ratio:
                ratios.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) + f" of `{other}`")
        n = len(runs[arm])
        cells = [f"{n - len(scores)} of {n}", "" if spread is None else f"{spread:.2f}"]
        rows.append([f"`{arm}`", *cells, "; ".join(ratios)])
    headers = ["arm", "diverged", "std. dev. of AP", "its ratio, with 95 % interval"]
    return [
        "Stability: a run has diverged if a loss was not finite, or its AP is below "
        f"{least:.1f}, a third",
        "of the median of the others here. The deviation is that of runs that haven't diverged, in",
        "the ratio about the mean of each teacher's students where seeds share teachers.",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
    ]


def _by_teacher(runs: List[dict]) -> List[List[float]]:
    """AP of runs that share teachers, teacher by teacher; of others, all together."""
    found: Dict[Any, List[float]] = defaultdict(list)
    for run in runs:
        found[run.get("teacher_seed")].append(run["AP"])
    shares = any(len(x) > 1 for x in found.values())
    return list(found.values()) if shares else [[run["AP"] for run in runs]]
