"""Statistics of arms over seeds, and of their differences, taken seed by seed.

Students of several seeds may share a teacher; then their differences aren't independent of each
other. From three teachers on, the independent units of an interval are the teachers: the mean of
each one's students is one value. Where each seed has a teacher of its own, or none, the units are
the seeds, as they are for one or two teachers: then an interval holds for these teachers only.

With as many students of each teacher, the t test over the teachers' means is exact for normal
differences, whatever teachers and seeds each add to the spread, also for few teachers. The price is
a long interval: its quantile is 4.30 for three teachers, 3.18 for four, 2.36 for eight. With
unequal numbers the test is approximate, and each teacher still counts alike.
"""

import bisect
import math
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import integrate, optimize, special, stats

LEVEL = 0.05  # of the two-sided tests; intervals hold the rest
POWER = 0.8


class Summary(NamedTuple):
    """Mean and sample standard deviation (None for less than two values) of ``n`` values."""

    n: int
    mean: float
    deviation: Optional[float]


class Difference(NamedTuple):
    """A paired difference.

    Attributes:
        values: by seed.
        mean: of the units.
        interval: the 95 % confidence interval of Student's t test of the units; None for less than
            two, or for differences without spread.
        p: of the test; None likewise.
        units: what is independent of each other: the teachers' means, or ``values``.
        teachers: how many the seeds have, as many as seeds where each has its own.
        pairs: how many pairs of runs it is made of, with replicates more than seeds.
    """

    values: Dict[int, float]
    mean: float
    interval: Optional[Tuple[float, float]]
    p: Optional[float]
    units: Tuple[float, ...]
    teachers: int
    pairs: int

    @property
    def units_are_independent(self) -> bool:
        """Whether they are: seeds that share one or two teachers aren't."""
        return len(self.units) <= self.teachers


def describe_sample(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of at least one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(len(values), float(np.mean(values)), deviation)


def summarize(
    values: Mapping[int, float], teachers: Optional[Mapping[int, int]] = None
) -> Difference:
    """Mean, interval and test of paired differences.

    Args:
        values: seed -> difference of AP; at least one.
        teachers: seed -> its teacher, see above; seeds without one count as having one of their
            own.
    """
    by_teacher: Dict[Tuple[bool, int], List[float]] = {}
    for seed, value in values.items():
        known = seed in (teachers or {})
        by_teacher.setdefault((known, teachers[seed] if known else seed), []).append(value)
    means = [float(np.mean(found)) for found in by_teacher.values()]
    units = tuple(means if 3 <= len(means) < len(values) else values.values())
    mean = float(np.mean(units))
    if len(units) < 2 or np.ptp(units) < 1e-9:
        return Difference(dict(values), mean, None, None, units, len(means), len(values))
    p = float(stats.ttest_1samp(units, 0).pvalue)
    interval = t_interval(units)
    return Difference(dict(values), mean, interval, p, units, len(means), len(values))


def t_interval(units: Sequence[float], level: float = LEVEL) -> Tuple[float, float]:
    """Student's confidence interval, 1 - ``level`` of it inside, of at least two values."""
    found = stats.ttest_1samp(units, 0).confidence_interval(1 - level)
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> List[float]:
    """The levels at which Holm's procedure tests each of several hypotheses, in their order.

    The smallest of m p values is tested at LEVEL / m, the next at LEVEL / (m - 1), and so on. From
    the first that isn't rejected on, none is, and the level stays. So a p value lies below its
    level exactly if Holm rejects its hypothesis, and its interval at this level leaves out 0
    exactly then. The chance of any false rejection is at most LEVEL, whatever the tests have in
    common (Holm, 1979).
    """
    levels, left = [0.0] * len(p_values), len(p_values)
    for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        levels[i] = LEVEL / left
        left -= p_values[i] < levels[i]
    return levels


def pooled_deviation(differences: Iterable[Difference]) -> Optional[float]:
    """The standard deviation from unit to unit (:class:`Difference`) of several paired differences,
    each about its own mean; None if none has two units."""
    deviation, freedom = _about_own_means([d.units for d in differences])
    return deviation if freedom else None


def _about_own_means(samples: Iterable[Sequence[float]]) -> Tuple[float, int]:
    """The standard deviation of several samples, each about its own mean, and its degrees of
    freedom."""
    samples = [x for x in samples if len(x) > 1]
    squares = sum(float(np.var(x, ddof=1)) * (len(x) - 1) for x in samples)
    freedom = sum(len(x) - 1 for x in samples)
    return math.sqrt(squares / freedom) if freedom else 0.0, freedom


def deviation_ratio(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> Optional[Tuple[float, float, float]]:
    """The ratio of two standard deviations, and its 95 % interval by the F distribution.

    For normal values that are independent but for what those of a sample have in common, such as
    their teacher: deviations are about each sample's own mean. Pairing isn't used.

    Args:
        ours, theirs: samples.

    Returns:
        None if a sample of two or more values with some spread is lacking.
    """
    found = _about_own_means(ours), _about_own_means(theirs)
    if not all(deviation > 0 for deviation, _ in found):
        return None
    ratio, freedom = found[0][0] / found[1][0], [n for _, n in found]
    high, low = (stats.f.ppf(q, *freedom) for q in (LEVEL / 2, 1 - LEVEL / 2))
    return ratio, ratio / math.sqrt(low), ratio / math.sqrt(high)


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
