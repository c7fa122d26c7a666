"""How the runs of a comparison were made: command, time, versions, hardware and teachers."""

from typing import Dict, List, Sequence

from .protocol import TEACHER
from .tables import is_given_teacher, seed_of_teacher


def provenance(content: dict) -> List[str]:
    """The last lines of a report.

    Args:
        content: of ``results.json``, with at least one run.
    """
    runs = content["runs"]
    steps = sum(run["iterations"] * run["seconds_per_step"] for run in runs) / 3600
    hours = sum(run["seconds"] for run in runs) / 3600
    lines = [f"    {content['command']}", ""]
    lines.append(
        f"{len(runs)} runs, {steps:.1f} hours of training steps; with evaluations, waiting"
    )
    lines.append(f"and restarts {hours:.1f} hours. With {_versions(runs)},")
    lines.append(f"on {_hardware(runs)}.")
    if any(run["arm"] == TEACHER for run in runs):
        current = [run for run in runs if not run.get("outdated")]
        given = [arm["arm"] for arm in content["arms"] if is_given_teacher(arm)]
        if all(seed_of_teacher(run) == run["seed"] for run in current):
            but = f", but that of {', '.join(given)} is one for all seeds" if given else ""
            lines.append(f"Each seed has its own teacher{but}.")
        else:
            lines += [f"The teacher of {', '.join(given)} is one for all seeds."] if given else []
            lines += [
                "Seeds without a teacher of their own share the others', in turn",
                "(`teacher_seed`). With three or more teachers, intervals and tests are those of",
                "the teachers' means; with fewer, those of the seeds, for these teachers only.",
            ]
    lines += _several_teachers(content)
    return lines + ["All numbers: [results.json](results.json)."]


def _several_teachers(content: dict) -> List[str]:
    """Says where the runs of a teacher's seed don't all belong to the same weights: a teacher whose
    weights were gone has been trained again."""
    belong = {arm["arm"] for arm in content["arms"] if arm.get("taught")} | {TEACHER}
    found: Dict[int, set] = {}
    for run in content["runs"]:
        if run["arm"] in belong and not run.get("outdated"):
            found.setdefault(seed_of_teacher(run), set()).add(run.get("teacher_sha256", ""))
    lines = []
    several = [str(seed) for seed, those in sorted(found.items()) if len(those - {""}) > 1]
    if several:
        lines += [
            f"Seed {', '.join(several)}: its teacher was trained more than once with the same",
            "settings. Which weights a student has learned from, its `teacher_sha256` tells.",
        ]
    unknown = [str(seed) for seed, those in sorted(found.items()) if len(those) > 1 and "" in those]
    if unknown:
        lines += [
            f"Seed {', '.join(unknown)}: of some runs it isn't recorded which training of the",
            "teacher they belong to.",
        ]
    return lines


def _versions(runs: Sequence[dict]) -> str:
    found: Dict[str, set] = {}
    for run in runs:
        for name, version in run["versions"].items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(those))}" for name, those in found.items())


def _hardware(runs: Sequence[dict]) -> str:
    return "; ".join(sorted({run["hardware"] for run in runs}))
