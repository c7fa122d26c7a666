"""The differences that a protocol has named before its runs, and what they come to."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

from .statistics import LEVEL, Difference, holm, t_interval

Interval = Tuple[float, float]


class Contrast(NamedTuple):
    """One named difference.

    Attributes:
        arm, reference: their names.
        difference: over the seeds that both have.
        corrected: its interval at the level of Holm's procedure (:func:`.statistics.holm`).
        equivalence: the 90 % interval. That it lies inside of +-margin is the same as that two
            one-sided tests at 5 % each (TOST; Schuirmann, 1987) refuse a difference beyond it.
        verdict: "helps" or "hurts" where ``corrected`` leaves out 0, with "less than the margin"
            where ``equivalence`` lies inside of it; else "no effect worth having" where it lies
            there; else "unresolved". One that holds only for the one or two teachers that the seeds
            share says so. As long as planned seeds are missing there is none: who looks after each
            seed finds an effect too often.
    """

    arm: str
    reference: str
    difference: Difference
    corrected: Optional[Interval]
    equivalence: Optional[Interval]
    verdict: str


def judge(
    named: Sequence[Tuple[str, str, Optional[Difference]]],
    margin: Optional[float],
    planned: Sequence[int] = (),
) -> List[Contrast]:
    """Judge the contrasts of a protocol together.

    A contrast without runs is left out of the result, but not of the number of tests. One that
    still lacks planned seeds takes part with p = 1: others must not look better because of what it
    isn't yet.

    Args:
        named: (arm, reference, difference) of all of them.
        margin: of the equivalence tests, in AP; None for none.
        planned: how many seeds each of them is to have; () if that isn't known.
    """
    wanted = planned or [0] * len(named)
    p_values = [
        1.0 if d is None or d.p is None or len(d.values) < seeds else d.p
        for (_, _, d), seeds in zip(named, wanted)
    ]
    found = []
    for (arm, reference, difference), level, seeds in zip(named, holm(p_values), wanted):
        if difference is None:
            continue
        corrected = equivalence = None
        if difference.interval is not None:
            corrected = t_interval(difference.units, level)
            equivalence = t_interval(difference.units, 2 * LEVEL)
        there = len(difference.values)
        verdict = f"{there} of {seeds} seeds" if there < seeds else ""
        verdict = verdict or _verdict(corrected, equivalence, margin) + _only_for(difference)
        found.append(Contrast(arm, reference, difference, corrected, equivalence, verdict))
    return found


def _verdict(
    corrected: Optional[Interval], equivalence: Optional[Interval], margin: Optional[float]
) -> str:
    is_small = equivalence is not None and margin is not None
    is_small = is_small and -margin < equivalence[0] and equivalence[1] < margin
    if corrected is not None and not corrected[0] <= 0 <= corrected[1]:
        found = "helps" if corrected[0] > 0 else "hurts"
        return f"{found}, less than the margin" if is_small else found
    return "no effect worth having" if is_small else "unresolved"


def _only_for(difference: Difference) -> str:
    teachers = difference.teachers
    if difference.units_are_independent:
        return ""
    return f", for {teachers} teacher{'s' * (teachers > 1)} only"
