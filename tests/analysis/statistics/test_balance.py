"""Balance of loads: hand arithmetic, scipy, loops over pairs of experts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from moejax.analysis.statistics import balance

LOADS = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 1000)
)
OF_EACH = {
    balance.entropy: lambda e: (0, math.log(e)),
    balance.effective_experts: lambda e: (1, e),
    balance.variation: lambda e: (0, math.sqrt(e - 1)),
    balance.max_violation: lambda e: (0, e - 1),
    balance.gini: lambda e: (0, 1 - 1 / e),
}
"""Each function's value at perfect balance and when one of E experts gets everything, in order of
size; entropies are largest at balance."""


def test_a_load_by_hand():
    load = np.array([6, 2, 0, 0])
    assert balance.share(load).tolist() == [0.75, 0.25, 0, 0]
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert balance.entropy(load) == pytest.approx(entropy)
    assert balance.relative_entropy(load) == pytest.approx(entropy / math.log(4))
    assert balance.effective_experts(load) == pytest.approx(math.exp(entropy))
    assert balance.variation(load) == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert balance.max_violation(load) == 2.0
    assert balance.gini(load) == (4 + 6 + 6 + 2 + 2 + 0) / (4 * 8)


@given(LOADS)
def test_numbers_agree_with_scipy_and_with_loops_and_ignore_the_order_of_experts(load_XE):
    load_XE[:, 0] += 1
    num_experts = load_XE.shape[1]
    np.testing.assert_allclose(balance.share(load_XE).sum(axis=1), 1)
    np.testing.assert_allclose(balance.entropy(load_XE), stats.entropy(load_XE, axis=1), atol=1e-12)
    np.testing.assert_allclose(balance.variation(load_XE), stats.variation(load_XE, axis=1))
    pairs = [sum(abs(a - b) for a in row for b in row) for row in load_XE]
    expected = [p / (2 * num_experts * sum(row)) for p, row in zip(pairs, load_XE, strict=True)]
    np.testing.assert_allclose(balance.gini(load_XE), expected, atol=1e-12)
    for function in OF_EACH:
        np.testing.assert_allclose(function(load_XE[:, ::-1]), function(load_XE), atol=1e-12)


@given(LOADS)
def test_numbers_lie_between_balance_and_one_expert_for_all(load_XE):
    load_XE[:, 0] += 1
    for function, bounds in OF_EACH.items():
        low, high = bounds(load_XE.shape[1])
        assert (function(load_XE) >= low - 1e-9).all(), function
        assert (function(load_XE) <= high + 1e-9).all(), function


@pytest.mark.parametrize("function", OF_EACH, ids=lambda f: f.__name__)
def test_the_bounds_are_reached(function):
    bounds = OF_EACH[function](4)
    ends = function(np.array([[5, 5, 5, 5], [0, 20, 0, 0]]))
    assert sorted(ends) == pytest.approx(bounds)


def test_balance_without_pairs_is_undefined():
    for function in [*OF_EACH, balance.relative_entropy]:
        assert np.isnan(function(np.zeros(4))), function
    assert np.isnan(balance.relative_entropy(np.array([7])))


def test_an_expert_is_dead_only_if_it_got_nothing_in_the_whole_window():
    window = np.array([[[0, 3, 0], [1, 1, 1]], [[0, 0, 2], [1, 0, 0]]])
    assert balance.dead(window).tolist() == [[True, False, False], [False, False, False]]
    assert balance.dead(window[1:]).tolist() == [[True, True, False], [False, True, True]]
    assert not balance.dead(window[:0]).any()
