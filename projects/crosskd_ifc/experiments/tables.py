"""What ``results.json`` holds, by arm and section."""

from typing import Dict, List, NamedTuple, Optional

import numpy as np

from .contrasts import Contrast, judge
from .statistics import Difference, summarize


class Section(NamedTuple):
    """The arms of one table: group ("" for the main arms), their names, and the arms that their
    differences are taken to."""

    group: str
    arms: List[str]
    references: List[str]


class Table:
    """What ``results.json`` holds, by arm.

    The replicates of a seed are one value, their mean; the difference of two arms is that of the
    replicates that both have, if there are any. A run that repeats another to the last digit, as on
    one machine, tells nothing new: it counts once.
    """

    def __init__(self, content: dict):
        self.content = content
        self.arms = {arm["arm"]: arm for arm in content["arms"]}
        self.runs: Dict[str, Dict[int, List[dict]]] = {name: {} for name in self.arms}
        for run in content["runs"]:
            if run["arm"] in self.runs:
                self.runs[run["arm"]].setdefault(run["seed"], []).append(run)

    def current(self, arm: str) -> Dict[int, List[dict]]:
        """seed -> runs of an arm, without those of earlier settings and mere repetitions."""
        found: Dict[int, List[dict]] = {}
        for seed, runs in self.runs[arm].items():
            distinct: Dict[str, dict] = {}
            for run in runs:
                if not run.get("outdated"):
                    distinct.setdefault(repr([run["AP"], run["AP50"], run["curve"]]), run)
            if distinct:
                found[seed] = list(distinct.values())
        return found

    def scores(self, arm: str, key: str = "AP") -> Dict[int, float]:
        """seed -> ``key`` of an arm, the mean of its replicates."""
        return _means(
            {s: [r[key] for r in runs if key in r] for s, runs in self.current(arm).items()}
        )

    def logged(self, arm: str, key: str) -> Dict[int, float]:
        """seed -> what an arm's runs have logged, the mean of their training's last quarter."""
        logs = {s: [r.get("statistics", {}) for r in x] for s, x in self.current(arm).items()}
        return _means({s: [log[key] for log in found if key in log] for s, found in logs.items()})

    def sections(self) -> List[Section]:
        """The main arms, then each group of ablations; arms without a run are left out."""
        sections = []
        for group in dict.fromkeys(arm["group"] for arm in self.arms.values()):
            names = [n for n, arm in self.arms.items() if arm["group"] == group and self.runs[n]]
            wanted = [other for name in names for other in self.arms[name]["versus"]]
            references = [n for n in dict.fromkeys(wanted) if self.runs.get(n)]
            if names:
                sections.append(Section(group, names, references))
        return sections

    def difference(self, arm: str, other: str, key: str = "AP") -> Optional[Difference]:
        """``arm`` minus ``other``, None where they have no seed in common."""
        ours, theirs = self.current(arm), self.current(other)
        values, teachers, pairs = {}, {}, 0
        for seed in sorted(set(ours) & set(theirs)):
            for run in (*theirs[seed], *ours[seed]):
                if "teacher_seed" in run:
                    teachers[seed] = run["teacher_seed"]
            first, second = (
                {run.get("replicate", 1): run[key] for run in runs if key in run}
                for runs in (ours[seed], theirs[seed])
            )
            if first and second:
                common = set(first) & set(second)
                means = [np.mean([x[n] for n in common or x]) for x in (first, second)]
                values[seed] = float(means[0] - means[1])
                pairs += max(len(common), 1)
        return summarize(values, teachers)._replace(pairs=pairs) if values else None

    def differences(self, section: Section, key: str = "AP"):
        """(arm, reference, difference) of a section, in order, where there are common seeds."""
        for arm in section.arms:
            for other in self.arms[arm]["versus"]:
                found = self.difference(arm, other, key)
                if found is not None:
                    yield arm, other, found

    def contrasts(self) -> List[Contrast]:
        """What the differences come to that the protocol has named."""
        named = [(a, b, self.difference(a, b)) for a, b in self.content.get("contrasts", [])]
        return judge(named, self.content.get("margin"))


def _means(values: Dict[int, List[float]]) -> Dict[int, float]:
    return {seed: float(np.mean(found)) for seed, found in values.items() if found}
