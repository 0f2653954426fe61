"""Statistics over a few seeds: intervals, paired t-tests, Holm's correction and power."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
LEVEL = 0.05
POWER = 0.8

BETTER, WORSE, SAME, NONE = "better", "worse", "not distinguishable", "no verdict"
ALONE = " if alone"
"""Follows "better" or "worse" if only Holm's correction makes a difference insignificant."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval, ``mean`` +- ``half_width``.

    A single value has neither interval nor deviation: they are None. If a value is not finite, the
    mean is NaN and they are None.
    """

    mean: float
    half_width: float | None
    deviation: float | None
    """Sample standard deviation (n - 1)."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Variant minus baseline over the seeds that both have, with ``p`` of the paired t-test.

    The other fields are as in `Estimate`; without a deviation there is no p.
    """

    seeds: tuple[int, ...]
    mean: float
    half_width: float | None
    deviation: float | None
    p: float | None


@functools.lru_cache
def critical(confidence: float, freedom: int) -> float:
    """The two-sided critical value of Student's t: the 0.975 quantile for 0.95.

    Raises:
      ValueError: no degrees of freedom.
    """
    _check(freedom)
    return float(stats.t.isf((1 - confidence) / 2, freedom))


def deviation_factors(freedom: int) -> tuple[float, float]:
    r"""The 95 % interval of a standard deviation, as multiples of its estimate.

    .. math::
       \sqrt{\nu / \chi^2_{0.975;\nu}}, \qquad \sqrt{\nu / \chi^2_{0.025;\nu}}

    for normal values with ``freedom`` degrees of freedom: 0.45 and 31.9 for one.

    Raises:
      ValueError: no degrees of freedom.
    """
    _check(freedom)
    tails = (1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2
    low, high = (math.sqrt(freedom / stats.chi2.ppf(tail, freedom)) for tail in tails)
    return low, high


def _check(freedom: int) -> None:
    if freedom < 1:
        raise ValueError(f"freedom={freedom} must be at least 1")


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
    """The mean difference at equal seeds; None without a common seed.

    Pairing removes the effects that a seed has on both: the order of the data and the initial
    weights.
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return None
    difference = estimate([values[seed] - baseline[seed] for seed in seeds])
    p = None
    if difference.deviation is not None:
        error = difference.deviation / math.sqrt(len(seeds))
        # Differences without any spread are certain either way.
        t = abs(difference.mean) / error if error else math.inf if difference.mean else 0.0
        p = float(2 * stats.t.sf(t, len(seeds) - 1))
    return Difference(seeds, difference.mean, difference.half_width, difference.deviation, p)


def outcome(difference: Difference | None, p_holm: float | None) -> str:
    """The outcome of a comparison of losses in a word or two."""
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
    decision = outcome(difference, p_holm)
    if not math.isfinite(difference.mean):
        return f"a difference is not finite: {NONE}"
    if difference.half_width is None or decision == NONE:
        return f"one seed: {NONE}"
    undecided = f"{SAME} at {len(difference.seeds)} seeds"
    if decision == SAME:
        return undecided
    digits = decimals(difference.half_width)
    size, error = abs(difference.mean), difference.half_width
    side, _, _ = decision.partition(ALONE)
    by = f"{side} by {size:.{digits}f} \N{PLUS-MINUS SIGN} {error:.{digits}f} {unit}"
    return f"{undecided} among so many variants (alone {by})" if decision != side else by


def decimals(half_width: float) -> int:
    """The number of decimals for an interval: three, or up to six if its first digit needs them."""
    return 3 if half_width <= 0 else min(max(3, -math.floor(math.log10(half_width))), 6)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, each to be compared with the family-wise level.

    The smallest of m is multiplied by m, the next by m - 1, and so on, with a running maximum.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    r"""The probability that a paired t-test detects a true difference.

    .. math::
       P(|T| > c), \qquad T \sim t_{n-1}(\lambda), \quad \lambda = \text{effect} \sqrt n

    with the noncentral t distribution and the critical value c of ``level``.

    Args:
      effect: the difference in standard deviations of the paired differences, at least 0.
    """
    freedom, shift = seeds - 1, effect * math.sqrt(seeds)
    limit = critical(1 - level, freedom)
    upper, lower = stats.nct.sf(limit, freedom, [shift, -shift])
    return float(upper + np.nan_to_num(lower))  # SciPy's NaN stands for a tail that is almost 0


@functools.lru_cache
def detectable(seeds: int, level: float = LEVEL, wanted: float = POWER) -> float:
    """The smallest true difference that is detected with probability ``wanted``.

    It is in standard deviations of the paired differences and needs at least two seeds.
    """
    if seeds < 2:
        raise ValueError(f"seeds={seeds}: a difference needs at least two seeds to be tested")
    high = 1.0
    while power(high, seeds, level) < wanted:
        high *= 2
    root = optimize.brentq(lambda effect: power(effect, seeds, level) - wanted, 0.0, high)
    # The annotation allows the pair that brentq returns with full_output=True.
    return float(root)  # pyright: ignore[reportArgumentType]
