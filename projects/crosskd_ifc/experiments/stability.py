"""What a report says of runs that diverge, where the protocol asks for it."""

from typing import List

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
        arm: [run["AP"] for run in found if "diverged" not in run and run["AP"] >= least]
        for arm, found in runs.items()
    }
    rows = []
    for arm, scores in ((arm, sound[arm]) for arm in arms):
        spread = describe_sample(scores).deviation if scores else None
        ratios = []
        for other in table.arms[arm]["versus"]:
            samples = scores, sound.get(other, [])
            if all(len(x) > 1 and np.ptp(x) > 0 for x in samples):
                ratio = "{:.2f} ({:.2f} to {:.2f})".format(*deviation_ratio(*samples))
                ratios.append(f"{ratio} of `{other}`")
        n = len(runs[arm])
        cells = [f"{n - len(scores)} of {n}", "" if spread is None else f"{spread:.2f}"]
        rows.append([f"`{arm}`", *cells, "; ".join(ratios)])
    headers = ["arm", "diverged", "std. dev. of AP", "its ratio, with 95 % interval"]
    return [
        "Stability: a run has diverged if a loss was not finite, or its AP is below "
        f"{least:.1f}, a third",
        "of the median of the others here. The deviation is that of runs that haven't diverged.",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
    ]
