"""Statistics over seeds, compared with SciPy, a replaced implementation and simulations."""

import math

import numpy as np
import pytest
from scipy import stats

from moejax.sweep import statistics

RECORDED = {
    2: (12.706204736174696, (0.44614918492070904, 31.910159349643934)),
    3: (4.302652729749458, (0.5206582666988175, 6.284734696485386)),
    6: (2.570581835636314, (0.6242080022589829, 2.452613988548297)),
    31: (2.0422724563012413, (0.7991119470752261, 1.3366733572099665)),
}
"""By the number of seeds: critical value and factors of the deviation from the hand-written
distribution functions that SciPy replaced."""


@pytest.mark.parametrize("seeds", RECORDED)
def test_quantiles_equal_those_of_the_replaced_implementation(seeds: int):
    """It bisected exact finite sums, so the two agree to rounding."""
    critical, factors = RECORDED[seeds]
    assert statistics.critical(0.95, seeds - 1) == pytest.approx(critical, rel=1e-12)
    assert statistics.deviation_factors(seeds - 1) == pytest.approx(factors, rel=1e-12)


@pytest.mark.parametrize(
    "seeds, difference, at_holms_first_of_11, power_of_1",
    [
        (2, 11.549888610839844, 126.9193115234375, 0.09280915505633579),
        (3, 3.2640438079833984, 10.860916137695312, 0.17925539377655225),
        (5, 1.681997299194336, 3.2346954345703125, 0.40138991737179636),
        (30, 0.52923583984375, 0.7223243713378906, 0.9995636009612046),
    ],
)
def test_power_equals_that_of_the_replaced_implementation(
    seeds: int, difference: float, at_holms_first_of_11: float, power_of_1: float
):
    """Its bisection of the detectable difference stopped at a relative 1e-6."""
    assert statistics.power(1.0, seeds) == pytest.approx(power_of_1, rel=1e-9)
    assert statistics.detectable(seeds) == pytest.approx(difference, rel=1.1e-6)
    found = statistics.detectable(seeds, 0.05 / 11)
    assert found == pytest.approx(at_holms_first_of_11, rel=1.1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.995, 0.99957])
def test_critical_values_are_quantiles_of_students_t(confidence: float, freedom: int):
    wanted = stats.t.ppf((1 + confidence) / 2, freedom)
    assert statistics.critical(confidence, freedom) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 25, 2000])
def test_deviation_factors_are_quantiles_of_chi_squared(freedom: int):
    low, high = statistics.deviation_factors(freedom)
    ends = stats.chi2.ppf([0.975, 0.025], freedom)
    assert (low, high) == pytest.approx(tuple(np.sqrt(freedom / ends)), rel=1e-9)


@pytest.mark.parametrize("count", [2, 5])
def test_the_interval_of_a_deviation_covers_it_in_95_percent_of_samples(count: int):
    found = np.random.default_rng(count).normal(0.0, 1.0, (40_000, count)).std(axis=1, ddof=1)
    low, high = statistics.deviation_factors(count - 1)
    held = (found * low <= 1) & (1 <= found * high)
    assert held.mean() == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 40_000))


def test_zero_degrees_of_freedom_are_refused():
    for function in (statistics.deviation_factors, lambda n: statistics.critical(0.95, n)):
        with pytest.raises(ValueError, match="freedom=0 must be at least 1"):
            function(0)


def test_critical_values_match_a_printed_table():
    """Two-sided 95 % points of t, as in any textbook's table."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}
    for freedom, value in table.items():
        assert round(statistics.critical(0.95, freedom), 3) == value


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_a_mean_has_a_t_interval_and_a_single_value_has_none(count: int):
    values = np.random.default_rng(count).normal(2.0, 0.1, count)
    found = statistics.estimate(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-12)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-12)
    assert found.deviation == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert statistics.estimate([2.5]) == statistics.Estimate(2.5, None, None)


@pytest.mark.parametrize(
    "values", [[math.nan], [1.0, math.nan], [math.inf, 1.0, 2.0], [math.inf, -math.inf]]
)
def test_non_finite_values_have_no_mean_and_no_interval(values: list[float]):
    found = statistics.estimate(values)
    assert math.isnan(found.mean) and found.half_width is None and found.deviation is None
    seeds = dict(enumerate(values))
    difference = statistics.paired(seeds, dict.fromkeys(seeds, 1.0))
    assert difference is not None and math.isnan(difference.mean) and difference.p is None
    said = statistics.verdict(difference, None, "nats")
    assert said == "a difference is not finite: no verdict"


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_difference_equals_scipys_paired_t_test(count: int):
    rng = np.random.default_rng(count)
    baseline = rng.normal(2.0, 0.1, count)
    values = baseline + rng.normal(-0.05, 0.04, count)
    found = statistics.paired(dict(enumerate(values)), dict(enumerate(baseline)))
    wanted = stats.ttest_rel(values, baseline)
    interval = wanted.confidence_interval(0.95)
    assert found is not None and found.half_width is not None
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert found.mean - found.half_width == pytest.approx(interval.low, rel=1e-9)
    assert found.mean + found.half_width == pytest.approx(interval.high, rel=1e-9)


def test_only_common_seeds_are_paired():
    found = statistics.paired({0: 2.0, 3: 2.5, 7: 9.0}, {3: 2.25, 0: 2.5, 5: 0.0})
    assert found is not None
    assert (found.seeds, found.mean) == ((0, 3), -0.125)
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None
    one = statistics.paired({0: 1.0}, {0: 2.0})
    assert one == statistics.Difference((0,), -1.0, None, None, None)


def test_differences_without_variance_have_p_0_or_1():
    same = {0: 1.0, 1: 2.0}
    equal = statistics.paired(same, same)
    better = statistics.paired({0: 0.5, 1: 1.5}, same)
    assert equal is not None and (equal.mean, equal.half_width, equal.p) == (0.0, 0.0, 1.0)
    assert better is not None and (better.mean, better.half_width, better.p) == (-0.5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("p", "p_holm", "mean", "wanted"),
    [
        (0.01, 0.049, -0.1, "better"),
        (0.01, 0.05, -0.1, "better if alone"),
        (0.01, 0.05, 0.1, "worse if alone"),
        (0.05, 0.05, 0.1, "not distinguishable"),
    ],
)
def test_a_p_value_equal_to_the_level_is_not_significant(
    p: float, p_holm: float, mean: float, wanted: str
):
    difference = statistics.Difference((0, 1, 2), mean, 0.1, 0.05, p)
    assert statistics.outcome(difference, p_holm) == wanted


def test_an_interval_is_shown_with_three_to_six_decimals():
    widths = {0.0: 3, 12.3: 3, 0.02: 3, 0.001: 3, 0.0009: 4, 0.000021: 5, 3e-9: 6}
    assert {width: statistics.decimals(width) for width in widths} == widths


def test_holms_correction_by_hand():
    """0.01 x 4; 0.02 x 3; 0.03 x 2; 0.04 x 1 would be below the one before it."""
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []
    assert statistics.holm([0.04]) == [0.04]


def test_holm_rejects_what_the_stepwise_procedure_rejects():
    """The procedure as published: continue while p_(i) <= level / (m - i + 1)."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.beta(0.3, 2, size=rng.integers(1, 9))
        rejected = np.zeros(len(p), bool)
        for rank, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (len(p) - rank):
                break
            rejected[index] = True
        assert [value <= 0.05 for value in statistics.holm(p.tolist())] == rejected.tolist()


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("level", [0.05, 0.05 / 11])
def test_power_is_the_tail_of_the_noncentral_t(seeds: int, level: float):
    limit = stats.t.isf(level / 2, seeds - 1)
    for effect in (0.0, 0.5, 1.0, 3.0, 10.0):
        t = stats.nct(seeds - 1, effect * math.sqrt(seeds))
        # The other tail is nothing there, and scipy's is NaN.
        wanted = t.sf(limit) + (t.cdf(-limit) if effect <= 1 else 0.0)
        assert statistics.power(effect, seeds, level) == pytest.approx(wanted, abs=1e-6)


def test_power_without_an_effect_equals_the_level():
    for seeds in (2, 3, 8):
        assert statistics.power(0.0, seeds) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_detectable_difference_is_detected_in_80_percent_of_simulations(seeds: int):
    rng = np.random.default_rng(seeds)
    draws = rng.normal(statistics.detectable(seeds), 1.0, (40_000, seeds))
    found = np.asarray(stats.ttest_1samp(draws, 0.0, axis=1)[1]) < 0.05
    assert found.mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 40_000))


def test_one_seed_cannot_detect_a_difference():
    with pytest.raises(ValueError, match="seeds=1: a difference needs at least two"):
        statistics.detectable(1)
