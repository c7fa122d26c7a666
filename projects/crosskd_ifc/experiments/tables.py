"""What ``results.json`` holds, by arm and section."""

from typing import Dict, List, NamedTuple, Optional

import numpy as np

from .contrasts import Contrast, judge
from .protocol import TEACHER_WEIGHTS
from .statistics import Difference, summarize


def replicate_number(run: dict) -> int:
    """Which replicate a run of ``results.json`` is."""
    return run.get("replicate", 1)


def seed_of_teacher(run: dict) -> int:
    """The seed of the teacher that a student learned from; a teacher's own. Records of old don't
    name a teacher of the run's own seed."""
    return run.get("teacher_seed", run["seed"])


def is_given_teacher(arm: dict) -> bool:
    """Whether an arm of ``results.json`` has a teacher for all its seeds that the protocol doesn't
    train. Records of old don't say it of a model-zoo teacher."""
    return arm.get("given_teacher", TEACHER_WEIGHTS in arm.get("opts", ()))


class Section(NamedTuple):
    """The arms of one table: group ("" for the main arms), their names, and the arms that their
    differences are taken to."""

    group: str
    arms: List[str]
    references: List[str]


class Table:
    """What ``results.json`` holds, by arm.

    The replicates of a seed are one value, their mean. The difference of two arms is that of runs
    that belong together, if there are any: that have the same number and have learned from the same
    training of a teacher; where no number is the same, that have learned from the same one. A run
    that repeats another to the last digit, as on one machine, tells nothing new: it counts once,
    and so does a pair of such runs.
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
            distinct: Dict[tuple, dict] = {}
            for number, run in enumerate(runs):
                # Diverged runs may agree by chance: how often they occur is what counts.
                others = number if "diverged" in run else -1
                if not run.get("outdated"):
                    distinct.setdefault((_scores_of(run), others), run)
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
        values, teachers, pairs = {}, {}, 0
        has_one_teacher = any(is_given_teacher(self.arms[name]) for name in (arm, other))
        for seed in sorted(set(self.current(arm)) & set(self.current(other))):
            sides = [
                [r for r in self.runs[name][seed] if key in r and not r.get("outdated")]
                for name in (arm, other)
            ]
            for name, side in zip((other, arm), reversed(sides)):
                for run in side:
                    if "teacher_seed" in run or self.arms[name].get("taught"):
                        teachers[seed] = seed_of_teacher(run)
            if has_one_teacher:
                teachers[seed] = 0
            if all(sides):
                found = _pairs(*sides)
                means = [_mean_of(pair, key) for pair in found or [sides]]
                values[seed] = float(np.mean([ours - theirs for ours, theirs in means]))
                pairs += len(found)
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
        content = self.content
        return judge(named, content.get("margin"), content.get("planned_seeds", ()))


def _pairs(ours: List[dict], theirs: List[dict]) -> List[List[List[dict]]]:
    """The runs of two arms and one seed that belong together, without mere repetitions."""
    runs = [*ours, *theirs]
    known = all("teacher_sha256" in run for run in runs)
    numbers = {replicate_number(run) for run in ours} & {replicate_number(run) for run in theirs}
    found = []
    for teacher in dict.fromkeys(run["teacher_sha256"] if known else None for run in runs):
        sides = [
            [r for r in x if r.get("teacher_sha256") == teacher or not known]
            for x in (ours, theirs)
        ]
        same = [
            [[r for r in x if replicate_number(r) == n] for x in sides] for n in sorted(numbers)
        ]
        same = [pair for pair in same if all(pair)]
        found += same or [sides] * (known and all(sides))
    return list({repr([sorted(map(_scores_of, x)) for x in pair]): pair for pair in found}.values())


def _mean_of(pair: List[List[dict]], key: str) -> List[float]:
    return [
        float(np.mean([run[key] for run in {_scores_of(run): run for run in runs}.values()]))
        for runs in pair
    ]


def _scores_of(run: dict) -> str:
    """What two runs share if one merely repeats the other."""
    return repr([run["AP"], run["AP50"], run["curve"]])


def _means(values: Dict[int, List[float]]) -> Dict[int, float]:
    return {seed: float(np.mean(found)) for seed, found in values.items() if found}
