"""What a few seeds can tell: intervals, paired differences, Holm's correction, what is detectable.

Everything rests on Student's t and the chi-squared distribution, whose degrees of freedom are whole
numbers here, so that their distribution functions are finite sums.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
LEVEL = 0.05
POWER = 0.8

BETTER, WORSE, SAME, NONE = "better", "worse", "not distinguishable", "no verdict"
ALONE = " if alone"
"""After better or worse: for a comparison that were the only one, without Holm's correction."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval, ``mean`` +- ``half_width``.

    One value has no interval and no deviation: they are None. Where a value is not finite, the mean
    is NaN and has neither.
    """

    mean: float
    half_width: float | None
    deviation: float | None
    """Sample standard deviation (n - 1)."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Variant minus baseline over the seeds that both have; ``p`` of the paired t-test.

    ``mean`` and the rest are as those of an `Estimate`; without a deviation there is no p.
    """

    seeds: tuple[int, ...]
    mean: float
    half_width: float | None
    deviation: float | None
    p: float | None


def within(t: float, freedom: int) -> float:
    r"""P(\|T\| <= t) of Student's t with ``freedom`` degrees of freedom.

    .. math::
       \theta = \arctan(t / \sqrt\nu), \qquad
       A = \sin\theta \left(1 + \tfrac12 \cos^2\theta + \tfrac{1 \cdot 3}{2 \cdot 4} \cos^4\theta
       + \dots\right) \text{ up to } \cos^{\nu - 2}\theta \text{ for even } \nu, \qquad
       A = \tfrac2\pi \left(\theta + \sin\theta \left(\cos\theta + \tfrac23 \cos^3\theta +
       \tfrac{2 \cdot 4}{3 \cdot 5} \cos^5\theta + \dots\right)\right) \text{ for odd.}

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    return _within_angle(math.atan(t / math.sqrt(freedom)), freedom)


def _within_angle(theta: float, freedom: int) -> float:
    if freedom < 1:
        raise ValueError(f"freedom={freedom} must be at least 1")
    odd = freedom % 2
    sine, cosine = math.sin(theta), math.cos(theta)
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@functools.lru_cache
def critical(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = ``confidence``: the 0.975 quantile for 0.95."""
    angle = _bisect(lambda theta: _within_angle(theta, freedom) - confidence, 0.0, math.pi / 2)
    return math.sqrt(freedom) * math.tan(angle)


def spread(freedom: int) -> tuple[float, float]:
    r"""Ends of the 95 % interval of a standard deviation, as multiples of the one that was found.

    .. math::
       \sqrt{\nu / \chi^2_{0.975;\nu}}, \qquad \sqrt{\nu / \chi^2_{0.025;\nu}}

    of values that are normal, with ``freedom`` degrees of freedom: 0.45 and 31.9 for one.
    """
    low, high = (_chi_squared_quantile(tail, freedom) for tail in _TAILS)
    return math.sqrt(freedom / high), math.sqrt(freedom / low)


_TAILS = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def chi_squared(x: float, freedom: int) -> float:
    r"""P(:math:`\chi^2_\nu` <= x) with ``freedom`` degrees of freedom, for x >= 0.

    .. math::
       1 - e^{-x/2} \sum_{j < \nu/2} \frac{(x/2)^j}{j!} \text{ for even } \nu, \qquad
       \operatorname{erf}\sqrt{x/2} - e^{-x/2} \sum_{j < (\nu-1)/2}
       \frac{(x/2)^{j+1/2}}{\Gamma(j + 3/2)} \text{ for odd.}

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.4.4 and 26.4.5.
    """
    if freedom < 1:
        raise ValueError(f"freedom={freedom} must be at least 1")
    if x <= 0:
        return 0.0
    half, shift = x / 2, freedom % 2 / 2
    whole = math.erf(math.sqrt(half)) if shift else 1.0
    powers = (j + shift for j in range(freedom // 2))
    # Each term in logarithms: its factors leave the range of floats at 300 degrees of freedom.
    log_half = math.log(half)
    return whole - sum(math.exp(p * log_half - half - math.lgamma(p + 1)) for p in powers)


@functools.lru_cache
def _chi_squared_quantile(share: float, freedom: int) -> float:
    high = float(freedom)
    while chi_squared(high, freedom) < share:
        high *= 2
    return _bisect(lambda x: chi_squared(x, freedom) - share, 0.0, high)


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """The root of a rising function between ``low`` and ``high``, to the last bits."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return middle


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval: t(n - 1) s / sqrt(n). At least one value."""
    count = len(values)
    if not all(map(math.isfinite, values)):
        return Estimate(math.nan, None, None)
    mean = statistics.fmean(values)
    if count == 1:
        return Estimate(mean, None, None)
    deviation = statistics.stdev(values)
    half_width = critical(CONFIDENCE, count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, half_width, deviation)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The mean of the differences at equal seeds; None if no seed is in both.

    Pairing takes out what a seed does to both: the order of the data and the initial weights.
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return None
    found = estimate([values[seed] - baseline[seed] for seed in seeds])
    p = None
    if found.deviation is not None:
        error = found.deviation / math.sqrt(len(seeds))
        # Differences without any spread: certain, whichever way.
        t = abs(found.mean) / error if error else math.inf if found.mean else 0.0
        p = 1 - within(t, len(seeds) - 1)
    return Difference(seeds, found.mean, found.half_width, found.deviation, p)


def outcome(difference: Difference | None, p_holm: float | None) -> str:
    """In a word or two, what the seeds say about a difference of losses."""
    if difference is None or difference.p is None or p_holm is None:
        return NONE
    side = BETTER if difference.mean < 0 else WORSE
    if p_holm < LEVEL:
        return side
    return f"{side}{ALONE}" if difference.p < LEVEL else SAME


def verdict(difference: Difference | None, p_holm: float | None, unit: str) -> str:
    """``outcome`` as a sentence, with numbers in the ``unit`` of the losses."""
    if difference is None:
        return f"no seed in common with the baseline: {NONE}"
    said = outcome(difference, p_holm)
    if not math.isfinite(difference.mean):
        return f"a difference is not finite: {NONE}"
    if difference.half_width is None or said == NONE:
        return f"one seed: {NONE}"
    undecided = f"{SAME} at {len(difference.seeds)} seeds"
    if said == SAME:
        return undecided
    digits = decimals(difference.half_width)
    size, error = abs(difference.mean), difference.half_width
    side, _, _ = said.partition(ALONE)
    by = f"{side} by {size:.{digits}f} \N{PLUS-MINUS SIGN} {error:.{digits}f} {unit}"
    return f"{undecided} among so many variants (alone {by})" if said != side else by


def decimals(half_width: float) -> int:
    """Decimals that show an interval: three, or as many as its first digit needs, up to six."""
    return 3 if half_width <= 0 else min(max(3, -math.floor(math.log10(half_width))), 6)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, each to be compared with the level that all of them share.

    The smallest of m is multiplied by m, the next by m - 1, and none is smaller than one before it.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    r"""How often a paired t-test finds a true difference of ``effect`` standard deviations.

    .. math::
       P(|T| > c) = E_u\left[\Phi(\lambda - c u) + \Phi(-\lambda - c u)\right], \qquad
       \lambda = \text{effect} \sqrt n, \quad u^2 \sim \chi^2_{n-1} / (n - 1)

    by Gauss-Legendre quadrature over u. The deviation is that of the differences.
    """
    freedom = seeds - 1
    limit, shift = critical(1 - level, freedom), effect * math.sqrt(seeds)
    # u has a deviation of about 1 / sqrt(2 freedom) around 1: beyond 9 of them there is nothing.
    # The first term is a step at u = lambda / c, 1 / c wide: it gets nodes of its own.
    low, high = max(0.0, 1 - 9 / math.sqrt(2 * freedom)), 1 + 9 / math.sqrt(2 * freedom)
    cuts = [min(max((shift + z) / limit, low), high) for z in (-8, 8)]
    total = 0.0
    for begin, end in itertools.pairwise([low, *cuts, high]):
        if begin == end:
            continue
        node_N, weight_N = _legendre()
        u_N = begin + (end - begin) * (node_N + 1) / 2
        found_N = [_normal(shift - limit * u) + _normal(-shift - limit * u) for u in u_N]
        total += float(_chi_density(u_N, freedom) * weight_N @ found_N) * (end - begin) / 2
    return total


def _chi_density(u_N: Float[np.ndarray, "N"], freedom: int) -> Float[np.ndarray, "N"]:
    """Of the square root of a chi-squared variable over its degrees of freedom, for u > 0."""
    half = freedom / 2
    constant = math.log(2) + half * math.log(half) - math.lgamma(half)
    return np.exp(constant + (freedom - 1) * np.log(u_N) - half * u_N**2)


@functools.lru_cache
def _legendre() -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    return np.polynomial.legendre.leggauss(64)


def _normal(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


@functools.lru_cache
def detectable(seeds: int, level: float = LEVEL, wanted: float = POWER) -> float:
    """The smallest true difference that is found with probability ``wanted``.

    In standard deviations of the paired differences; at least two seeds.
    """
    if seeds < 2:
        raise ValueError(f"seeds={seeds}: a difference needs at least two seeds to be tested")
    high = 1.0
    while power(high, seeds, level) < wanted:
        high *= 2
    low = 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, seeds, level) < wanted else (low, middle)
    return high
