"""What ``results.json`` holds, by arm and section."""

from typing import Dict, List, NamedTuple, Optional

from .contrasts import Contrast, judge
from .statistics import Difference, paired_difference


class Section(NamedTuple):
    """The arms of one table: group ("" for the main arms), their names, and the arms that their
    differences are taken to."""

    group: str
    arms: List[str]
    references: List[str]


class Table:
    """What ``results.json`` holds, by arm."""

    def __init__(self, content: dict):
        self.content = content
        self.arms = {arm["arm"]: arm for arm in content["arms"]}
        self.runs: Dict[str, Dict[int, dict]] = {name: {} for name in self.arms}
        for run in content["runs"]:
            if run["arm"] in self.runs:
                self.runs[run["arm"]][run["seed"]] = run

    def current(self, arm: str) -> Dict[int, dict]:
        """seed -> run of an arm, without those of earlier settings."""
        return {seed: run for seed, run in self.runs[arm].items() if not run.get("outdated")}

    def scores(self, arm: str, key: str = "AP") -> Dict[int, float]:
        """seed -> ``key`` of an arm, without runs of earlier settings."""
        return {seed: run[key] for seed, run in self.current(arm).items() if key in run}

    def logged(self, arm: str, key: str) -> Dict[int, float]:
        """seed -> what an arm's run has logged, the mean of the last quarter of its training."""
        runs = {seed: run.get("statistics", {}) for seed, run in self.current(arm).items()}
        return {seed: found[key] for seed, found in runs.items() if key in found}

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
        teachers = {}
        for name in (other, arm):
            for seed, run in self.current(name).items():
                if "teacher_seed" in run:
                    teachers[seed] = run["teacher_seed"]
        return paired_difference(self.scores(arm, key), self.scores(other, key), teachers)

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
