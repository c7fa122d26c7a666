"""The report of a comparison, from its ``results.json`` alone: statistics, tables, figures.

Seeds are paired: runs of one seed share the start and, where they have one, the teacher, so that
the difference of two arms is taken seed by seed.
"""

import os
import textwrap
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from ..common.files import replacing
from ..config import ConfigError
from .figures import draw_curves, draw_differences, has_curves
from .provenance import provenance
from .stability import stability
from .statistics import (
    Difference,
    describe_sample,
    detectable_difference,
    pooled_deviation,
    seeds_needed,
)
from .tables import Section, Table

# What says most of how the student is read by the teacher's head.
_STATISTICS = (
    *("agreement_cross_head", "agreement_student", "fused_length", "fused_cosine"),
    *("grad_cosine_pyramid", "grad_ratio_pyramid"),
    *("grad_cosine_shared", "grad_ratio_shared"),  # of records before there was one place for all
    *("grad_norm", "grad_norm_variation"),
)
_NAMES = {"fused_length": "norm ratio"}  # of the combined feature to the teacher's
_LOGGED = "Logged in the last quarter of the training, means over the seeds (docs/options.md):"


def write_report(content: dict, folder: str) -> str:
    """Write ``report.md`` and, where there is something to draw, ``curves.png`` and
    ``differences.png``; returns the report's path.

    Args:
        content: of ``results.json``, with at least one run.
        folder: folder to write to.

    Raises:
        ConfigError: if no run is of an arm that the protocol has.
    """
    table = Table(content)
    os.makedirs(folder, exist_ok=True)
    if not table.sections():
        raise ConfigError(f"{content['name']}: no run in results.json is of an arm of the protocol")
    curves = os.path.join(folder, "curves.png")
    if has_curves(table):
        draw_curves(table, curves)
    elif os.path.exists(curves):  # of an earlier state
        os.remove(curves)
    has_differences = draw_differences(table, os.path.join(folder, "differences.png"))
    path = os.path.join(folder, "report.md")
    with replacing(path) as f:
        f.write(report_text(content, differences_figure=has_differences).encode())
    return path


def report_text(content: dict, *, differences_figure: bool = True) -> str:
    """The report, Markdown that reads well as plain text, too."""
    table = Table(content)
    lines = [f"# {content['title']}", "", *_introduction(content), "", *_contrasts(table)]
    for section in table.sections():
        lines += [f"## {section.group[:1].upper()}{section.group[1:] or 'Main arms'}", ""]
        lines += [_results(table, section), ""]
        differences = _differences(table, section)
        lines += ["Paired differences of AP:", "", differences, ""] if differences else []
        lines += _power(table, section)
        lines += stability(table, section) if content.get("stability") else []
        logged = _statistics(table, section)
        lines += [_LOGGED, "", logged, ""] if logged else []
    if any(len(runs) > 1 for arm in table.arms for runs in table.current(arm).values()):
        lines += [
            "Runs of a seed that were made again, on another machine or with another version of",
            "the code, are averaged first; a difference is that of runs made together, if there",
            "are any.",
            "",
        ]
    lines += _missing(table)
    outdated = sum(bool(run.get("outdated")) for run in content["runs"])
    if outdated:
        lines += [
            f"{outdated} runs are of earlier settings, or not planned any more (\\*): in no mean,",
            "difference or figure.",
            "",
        ]
    figures = {"Learning curves": "curves.png"} if has_curves(table) else {}
    figures.update({"Paired differences": "differences.png"} if differences_figure else {})
    lines += ["## Figures", ""] if figures else []
    for title, file in figures.items():
        lines += [f"![{title}]({file})", ""]
    return "\n".join([*lines, "## How", "", *provenance(content), ""])


def _missing(table: Table) -> List[str]:
    """Which planned runs aren't there."""
    missing = []
    for name, arm in table.arms.items():
        planned = arm.get("seeds", [])  # earlier versions didn't write them
        there = len(set(planned) & set(table.current(name)))
        if there < len(planned):
            missing.append(f"`{name}` {len(planned) - there} of {len(planned)}")
    if not missing:
        return []
    text = f"Planned runs that aren't there: {', '.join(missing)}. If they failed, the mean of the "
    text += "arm's other runs favours it."
    return [*textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False), ""]


def _introduction(content: dict) -> List[str]:
    lines = [f"AP and AP50 on `{content['test']}`, in percent: mean ± standard deviation."]
    if content["validation"]:
        validation = f"`{content['validation']}`"
        lines[0] = f"AP and AP50 on `{content['test']}`, AP (val) on {validation}, in percent:"
        lines += ["mean ± standard deviation over seeds. Settings are chosen by AP (val) only."]
    return lines + [
        "Differences are taken seed by seed, with a 95 % confidence interval and the p value of a",
        "paired t test, not corrected for the number of comparisons; one seed has neither.",
    ]


def _contrasts(table: Table) -> List[str]:
    """The differences that were named beforehand, and what they come to."""
    content = table.content
    named, margin = content.get("contrasts", []), content.get("margin")
    if not named:
        return []
    rows = [
        [
            f"`{c.arm}` minus `{c.reference}`",
            f"{c.difference.mean:+.1f}",
            _interval(c.corrected),
            _interval(c.equivalence),
            _n(c.difference),
            c.verdict,
        ]
        for c in table.contrasts()
    ]
    headers = ["contrast", "AP", "corrected interval", "90 % interval", "n", "verdict"]
    text = f"The {len(named)} that the protocol names; Holm's correction for as many tests at 5 %:"
    lines = ["## Contrasts", "", text]
    lines += ['"helps" and "hurts": the corrected interval leaves out 0.']
    if margin is not None:
        lines += [
            '"less than the margin": the 90 % interval (not corrected) also lies inside of '
            f"±{margin:g} AP;",
            '"no effect worth having": only this one does.',
        ]
    if any(c.verdict.endswith(" seeds") for c in table.contrasts()):
        lines += ["There is no verdict as long as planned seeds are missing."]
    if len(rows) < len(named):
        lines += [f"{len(named) - len(rows)} of them have no runs of today's settings."]
    return [*lines, "", tabulate(rows, headers, tablefmt="github", disable_numparse=True), ""]


def _results(table: Table, section: Section) -> str:
    arms = [n for n in section.references if n not in section.arms] + section.arms
    seeds = sorted({seed for name in section.arms for seed in table.runs[name]})
    headers = ["arm", "", "n", "AP", "AP50", f"AP of seed {' / '.join(map(str, seeds))}"]
    with_validation = bool(table.content["validation"])
    rows = []
    for name in arms:
        # An arm of another section, over this section's seeds, is here to compare with.
        if not set(seeds) & set(table.runs[name]):
            continue
        current = [runs for seed, runs in table.current(name).items() if seed in seeds]
        title = table.arms[name]["title"].replace("|", "\\|")
        row = [f"`{name}`", title, _with_runs(current)]
        row += [_mean(table.scores(name, key), seeds) for key in ("AP", "AP50")]
        row += [" / ".join(_cell(table, name, seed) for seed in seeds)]
        row += [_mean(table.scores(name, "AP_val"), seeds)] if with_validation else []
        rows.append(row)
    headers += ["AP (val)"] if with_validation else []
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _differences(table: Table, section: Section) -> str:
    cells: Dict[str, Dict[str, str]] = {}
    for arm, other, found in table.differences(section):
        cells.setdefault(arm, {})[other] = _difference(found)
    others = [n for n in section.references if any(n in row for row in cells.values())]
    rows = [[f"`{arm}`", *(row.get(other, "") for other in others)] for arm, row in cells.items()]
    headers = ["arm", *(f"minus `{other}`" for other in others)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""


def _power(table: Table, section: Section) -> List[str]:
    """What differences these seeds, or the teachers that they share, can show at all."""
    all_found = [difference for _, _, difference in table.differences(section)]
    by_teacher = any(len(d.units) < len(d.values) for d in all_found)
    unit = "teacher" if by_teacher else "seed"
    found = [d for d in all_found if d.units_are_independent] if by_teacher else all_found
    deviation = pooled_deviation(found)
    if deviation is None or deviation < 0.05:  # 0.0 in these tables
        return []
    n = max(len(difference.units) for difference in found)
    shown, needed = detectable_difference(deviation, n), seeds_needed(deviation, 1.0)
    pooled = "all" if found == all_found else f"{len(found)} of {len(all_found)}"
    return [
        f"A difference varies from {unit} to {unit} by {deviation:.1f} (standard deviation, "
        f"{pooled} pooled): {n} {unit}s show",
        f"a true one of {shown:.1f} AP in 80 % of such comparisons; one of 1 AP takes {needed} "
        f"{unit}s.",
        "",
    ]


def _statistics(table: Table, section: Section) -> str:
    found = {arm: {key: table.logged(arm, key) for key in _STATISTICS} for arm in section.arms}
    keys = [key for key in _STATISTICS if any(row[key] for row in found.values())]
    rows = []
    for arm, row in found.items():
        if any(row.values()):
            means = [f"{np.mean(list(row[key].values())):.2f}" if row[key] else "" for key in keys]
            counts = [len(values) for values in row.values() if values]
            n = " to ".join(map(str, sorted({min(counts), max(counts)})))
            rows.append([f"`{arm}`", n, *means])
    headers = ["arm", "n", *(_NAMES.get(key, f"`{key}`") for key in keys)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""


def _difference(found: Difference) -> str:
    text = f"{found.mean:+.1f}"
    if found.interval is not None:
        p = f"p = {found.p:.3f}" if found.p >= 0.001 else "p < 0.001"
        text += f" ({_interval(found.interval)}), {p}"
    return f"{text}, n = {_n(found)}"


def _interval(found: Optional[Tuple[float, float]]) -> str:
    return "{:+.1f} to {:+.1f}".format(*found) if found else ""


def _n(found: Difference) -> str:
    """How many seeds; how many teachers where they share them, and how many pairs of runs that
    belong together where these are more or fewer."""
    seeds = len(found.values)
    teachers = f"{found.teachers} teacher{'s' * (found.teachers > 1)}"
    more = [teachers] if found.teachers < seeds else []
    more += [f"{found.pairs} pairs"] if found.pairs != seeds else []
    return f"{seeds} ({', '.join(more)})" if more else str(seeds)


def _with_runs(by_seed: Sequence[List[dict]]) -> str:
    """How many seeds, and how many runs where more."""
    seeds, runs = len(by_seed), sum(map(len, by_seed))
    return f"{seeds} ({runs} runs)" if runs > seeds else str(seeds)


def _cell(table: Table, arm: str, seed: int) -> str:
    if seed in table.current(arm):
        return f"{table.scores(arm)[seed]:.1f}"
    outdated = table.runs[arm].get(seed)
    return f"{outdated[-1]['AP']:.1f}*" if outdated else "-"


def _mean(scores: Mapping[int, float], seeds: Sequence[int]) -> str:
    values = [score for seed, score in scores.items() if seed in seeds]
    if not values:
        return ""
    summary = describe_sample(values)
    spread = "" if summary.deviation is None else f" ± {summary.deviation:.1f}"
    return f"{summary.mean:.1f}{spread}"
