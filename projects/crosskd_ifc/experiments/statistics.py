"""Statistics of arms over seeds, and of their differences, taken seed by seed."""

import bisect
import math
from typing import Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import integrate, optimize, special, stats

Scores = Mapping[int, float]  # seed -> AP

LEVEL = 0.05  # of the two-sided tests; intervals hold the rest
POWER = 0.8


class Summary(NamedTuple):
    """Mean and sample standard deviation (None for less than two values) of ``n`` values."""

    n: int
    mean: float
    deviation: Optional[float]


class Difference(NamedTuple):
    """A paired difference: ``values`` by seed, and their mean; the 95 % confidence interval and the
    p value of Student's t test are None for less than two seeds, or differences without spread."""

    values: Dict[int, float]
    mean: float
    interval: Optional[Tuple[float, float]]
    p: Optional[float]


def describe_sample(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of at least one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), deviation)


def paired_difference(ours: Scores, theirs: Scores) -> Optional[Difference]:
    """``ours`` minus ``theirs`` over the seeds that both have; None if there is none."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    values = {seed: ours[seed] - theirs[seed] for seed in seeds}
    mean, spread = float(np.mean(list(values.values()))), np.ptp(list(values.values()))
    if len(seeds) < 2 or spread < 1e-9:
        return Difference(values, mean, None, None)
    test = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
    interval = test.confidence_interval(1 - LEVEL)
    return Difference(values, mean, (float(interval.low), float(interval.high)), float(test.pvalue))


def pooled_deviation(differences: Iterable[Difference]) -> Optional[float]:
    """The standard deviation from seed to seed of several paired differences, each about its own
    mean; None if none has two seeds."""
    samples = [list(d.values.values()) for d in differences if len(d.values) > 1]
    if not samples:
        return None
    squares = sum(float(np.var(x, ddof=1)) * (len(x) - 1) for x in samples)
    return math.sqrt(squares / sum(len(x) - 1 for x in samples))


def power(difference: float, deviation: float, n: int) -> float:
    """The probability that a paired t test (two-sided, at 5 %) finds a difference.

    With the normal distribution and the sample deviation's, chi's, one inside the other: scipy's
    noncentral t is nan for few seeds and large differences.

    Args:
        difference, deviation: the true mean and standard deviation over seeds.
        n: seeds, at least two.
    """
    freedom = n - 1
    critical = stats.t.ppf(1 - LEVEL / 2, freedom)
    shift = abs(difference) / deviation * math.sqrt(n)

    def found(quantile: float) -> float:
        bound = critical * stats.chi.ppf(quantile, freedom) / math.sqrt(freedom)
        return special.ndtr(shift - bound) + special.ndtr(-shift - bound)

    return integrate.quad(found, 0, 1)[0]


def detectable_difference(deviation: float, n: int) -> float:
    """The true difference that ``n`` seeds find with a probability of 80 % (:func:`power`)."""
    unit = optimize.brentq(lambda d: power(d, 1.0, n) - POWER, 1e-3, 50, xtol=1e-4)
    return unit * deviation


def seeds_needed(deviation: float, difference: float) -> int:
    """The least number of seeds that find a true difference, not 0, with a probability of 80 %
    (:func:`power`)."""
    above = 2
    while power(difference, deviation, above) < POWER:
        above *= 2
    candidates = range(above // 2 + 1, above + 1)
    return candidates[
        bisect.bisect_left(candidates, POWER, key=lambda n: power(difference, deviation, n))
    ]
