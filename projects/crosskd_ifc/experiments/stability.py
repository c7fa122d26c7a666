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
    of the report.

    The median that tells a failed run is that of the main arms: in a section where most runs fail
    its own says nothing.
    """
    arms = [arm for arm in section.arms if arm != TEACHER]
    runs = {arm: _runs(table, arm) for arm in dict.fromkeys([*arms, *section.references])}
    if not any(runs[arm] for arm in arms):
        return []
    main = [arm for arm, entry in table.arms.items() if not entry["group"] and arm != TEACHER]
    found = [run for arm in main or arms for run in _runs(table, arm)]
    ended = [run["AP"] for run in found if "diverged" not in run]
    least = float(np.median(ended)) / 3 if ended else 0.0
    sound = {
        arm: [run for run in found if "diverged" not in run and run["AP"] >= least]
        for arm, found in runs.items()
    }
    rows = []
    for arm in arms:
        scores = [ap for aps in _by_teacher(sound[arm]) for ap in aps]
        spread = describe_sample(scores).deviation if scores else None
        ratios = []
        for other in table.arms[arm]["versus"]:
            ratio = deviation_ratio(*(_by_teacher(sound.get(x, [])) for x in (arm, other)))
            if ratio:
                ratios.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio) + f" of `{other}`")
        n = len(runs[arm])
        cells = [f"{n - len(sound[arm])} of {n}", "" if spread is None else f"{spread:.2f}"]
        rows.append([f"`{arm}`", *cells, "; ".join(ratios)])
    headers = ["arm", "diverged", "std. dev. of AP", "its ratio, with 95 % interval"]
    return [
        "Stability: a run has diverged if a loss was not finite, or its AP is below "
        f"{least:.1f}, a third",
        "of the main arms' median. The deviation is that of runs that haven't diverged, in the",
        "ratio about the mean of each teacher's students where seeds share teachers.",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
    ]


def _runs(table: Table, arm: str) -> List[dict]:
    return [run for found in table.current(arm).values() for run in found]


def _by_teacher(runs: List[dict]) -> List[List[float]]:
    """AP by seed, the mean of its replicates: of seeds that share teachers, teacher by teacher; of
    others, all together."""
    replicates: Dict[Any, List[float]] = defaultdict(list)
    for run in runs:
        replicates[run.get("teacher_seed"), run["seed"]].append(run["AP"])
    found: Dict[Any, List[float]] = defaultdict(list)
    for (teacher, _), aps in replicates.items():
        found[teacher].append(float(np.mean(aps)))
    shares = any(len(x) > 1 for x in found.values())
    return list(found.values()) if shares else [[ap for aps in found.values() for ap in aps]]
