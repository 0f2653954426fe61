"""The variance over seeds, and the difference that a sweep can detect: numbers by scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from moejax.sweep import statistics
from moejax.sweep.seed_variance import (
    Detectable,
    SeedVariance,
    best,
    detectable_difference,
    estimates,
    seed_variance,
)
from moejax.sweep.table import detectable_note
from tests.sweep.test_comparison import compared, results_of, sweep_with


def test_the_seed_variance_is_pooled_over_the_differences():
    """Differences to a: +-0.01 (2 seeds), and 0.01, 0.02, 0.06 (3): variances 2e-4, 7e-4."""
    losses = {
        "a": {0: 2.0, 1: 2.1, 2: 2.2},
        "b": {0: 2.01, 1: 2.09},
        "c": {0: 2.01, 1: 2.12, 2: 2.26},
    }
    found, over_seeds = estimates(losses, "a", "here")
    assert found.paired and found.freedom == 3 and found.source == "5 differences to a in here"
    assert found.deviation == pytest.approx(math.sqrt((2e-4 + 2 * 7e-4) / 3))
    groups = [list(own.values()) for own in losses.values()]
    pooled = sum(np.var(group) * len(group) for group in groups) / 5
    assert not over_seeds.paired and over_seeds.freedom == 5
    assert over_seeds.deviation == pytest.approx(math.sqrt(2 * pooled))


def test_a_pilot_of_one_variant_gives_the_unpaired_estimate():
    (found,) = estimates({"a": {0: 2.0, 1: 2.02}}, "a", "runs/pilot")
    assert not found.paired
    assert found.deviation == pytest.approx(math.sqrt(2) * 0.02 / math.sqrt(2))
    assert estimates({"a": {0: 2.0}}, "a", "") == estimates({}, "a", "") == []


@pytest.mark.parametrize(
    "paired, unpaired, wins", [(1, 10, False), (3, 4, False), (3, 3, True), (4, 99, True)]
)
def test_paired_differences_are_preferred_unless_they_are_few(
    paired: int, unpaired: int, wins: bool
):
    pairs, seeds = (
        SeedVariance(0.1, True, paired, "pairs"),
        SeedVariance(0.2, False, unpaired, "seeds"),
    )
    few = SeedVariance(0.3, True, 1, "few pairs")
    wanted = pairs if wins else seeds
    assert best([few, pairs, seeds]) == best([seeds, few, pairs]) == wanted
    assert best([few]) == few and best([]) is None


def test_two_seeds_of_two_variants_use_the_deviation_over_seeds():
    """The paired differences have one degree of freedom, the deviations over seeds two."""
    losses = {"top_2": (2.0, 2.3), "close": (2.01, 2.311)}
    found = seed_variance(sweep_with(losses, baseline="top_2"), results_of(losses))
    assert found is not None and (found.paired, found.freedom) == (False, 2)


def test_the_detectable_difference_scales_with_the_deviation():
    found = compared().detectable
    assert found is not None and (found.seeds, found.comparisons) == (3, 3)
    assert found.difference == pytest.approx(found.deviation * statistics.detectable(3))
    assert found.freedom == 6 and found.factors is not None
    assert found.factors == pytest.approx(np.sqrt(6 / stats.chi2.ppf([0.975, 0.025], 6)))
    limit = stats.t.isf(0.05 / 6, 2)
    shift = found.difference_holm / found.deviation * math.sqrt(3)
    assert stats.nct.sf(limit, 2, shift) == pytest.approx(0.8, abs=1e-4)


def test_the_variant_with_the_fewest_common_seeds_limits_the_detectable_difference():
    losses = {"top_2": (2.0, 2.3, 2.1), "close": (2.01, 2.31), "other": (2.02, 2.3, 2.1)}
    found = detectable_difference(
        sweep_with(losses, baseline="top_2"), SeedVariance(0.1, True, 4, "a pilot")
    )
    assert found is not None and (found.seeds, found.comparisons) == (2, 2)
    assert found.difference == pytest.approx(0.1 * statistics.detectable(2))


def found_with(freedom: int) -> Detectable:
    factors = statistics.deviation_factors(freedom) if freedom else None
    return Detectable(0.025, 0.05, 2, 2, 0.0016, freedom, factors, "runs/pilot")


def test_the_detectable_difference_has_an_interval_below_10_degrees_of_freedom():
    said = detectable_note(found_with(1), "nats/byte")
    assert said == (
        "2 seeds detect a difference of 0.025 nats/byte in 80 % of sweeps (0.050 with Holm's "
        "correction for 2 variants); from runs/pilot, 1 degree of freedom: the true value may be "
        "0.45 to 32 times that, 0.011 to 0.798 nats/byte (95 % interval)."
    )
    low, high = 0.025 * np.sqrt(9 / stats.chi2.ppf([0.975, 0.025], 9))
    assert f"9 degrees of freedom: the true value may be 0.69 to 1.8 times that, {low:.3f} to " in (
        nine := detectable_note(found_with(9), "nats")
    )
    assert nine.endswith(f"{low:.3f} to {high:.3f} nats (95 % interval).")
    # Enough of them, and a number that was given.
    for freedom in (10, 0):
        assert detectable_note(found_with(freedom), "nats").endswith("; from runs/pilot.")
