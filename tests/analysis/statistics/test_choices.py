"""Choices of tokens, alone, together, in two layers and at two steps, against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.analysis.statistics.choices import (
    churn,
    coactivation,
    coactivation_by_chance,
    saturation,
    saturation_by_chance,
    transition_lift,
    transitions,
)
from moejax.record.counts import NONE, first_choice, selected

SEEDS = st.integers(0, 2**32 - 1)


def choices(seed: int, num_tokens: int = 40, num_experts: int = 5, k: int = 3):
    """Distinct experts and weights for each token, some columns inactive."""
    random = np.random.default_rng(seed)
    expert_TK = np.argsort(random.random((num_tokens, num_experts)), axis=1)[:, :k]
    weight_TK = random.random((num_tokens, k)) * (random.random((num_tokens, k)) < 0.7)
    return expert_TK.astype(np.int16), weight_TK.astype(np.float32)


@given(SEEDS)
def test_inactive_columns_choose_nothing_and_the_largest_weight_comes_first(seed):
    expert_TK, weight_TK = choices(seed)
    selected_TE = selected(expert_TK, weight_TK, 5)
    first_T = first_choice(expert_TK, weight_TK)
    for t, (experts, weights) in enumerate(zip(expert_TK, weight_TK, strict=True)):
        active = {int(e): w for e, w in zip(experts, weights, strict=True) if w}
        assert set(np.flatnonzero(selected_TE[t])) == set(active)
        assert first_T[t] == (max(active, key=lambda e: active[e]) if active else NONE)


def test_the_first_column_of_equal_weights_is_the_first_choice():
    assert first_choice(np.array([[3, 1]]), np.array([[0.5, 0.5]])).tolist() == [3]


# Co-activation.


@given(SEEDS)
def test_coactivation_is_what_a_loop_over_tokens_counts_in_any_order(seed):
    selected_TE = selected(*choices(seed), 5)
    together_EE = coactivation(selected_TE)
    for i in range(5):
        rows = [row for row in selected_TE if row[i]]
        for j in range(5):
            expected = sum(row[j] for row in rows) / len(rows) if rows and i != j else np.nan
            np.testing.assert_allclose(together_EE[i, j], expected)
    np.testing.assert_array_equal(coactivation(selected_TE[::-1]), together_EE)


def test_coactivation_is_asymmetric():
    together_EE = coactivation(np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 0, 1]], bool))
    np.testing.assert_array_equal(
        together_EE, [[np.nan, 0.25, 0.5], [1, np.nan, 0], [1, 0, np.nan]]
    )


@given(SEEDS, st.integers(1, 5))
def test_rows_of_coactivation_sum_to_the_other_choices_and_chance_is_their_mean(seed, k):
    expert_TK, weight_TK = choices(seed, k=k)
    selected_TE = selected(expert_TK, np.ones_like(weight_TK), 5)
    together_EE = coactivation(selected_TE)
    np.testing.assert_allclose(np.nansum(together_EE, axis=1), (k - 1) * selected_TE.any(axis=0))
    assert coactivation_by_chance(selected_TE) == pytest.approx((k - 1) / 4)


def test_chance_of_tokens_with_different_numbers_of_choices_weighs_pairs():
    assert coactivation_by_chance(np.array([[1, 1, 1], [1, 0, 0]], bool)) == (3 * 2 + 1 * 0) / 4 / 2
    assert np.isnan(coactivation_by_chance(np.zeros((2, 3), bool)))


# Transitions.


@given(SEEDS)
def test_transitions_are_what_a_loop_counts_and_sum_to_1(seed):
    first_T, second_T = (first_choice(*choices(seed + i, num_experts=4)) for i in (0, 1))
    pairs = [(a, b) for a, b in zip(first_T, second_T, strict=True) if NONE not in (a, b)]
    share_EE = transitions(first_T, second_T, 4)
    expected = [[pairs.count((i, j)) / len(pairs) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(share_EE, expected)
    assert share_EE.sum() == pytest.approx(1)
    lift_EE = transition_lift(share_EE)
    for i in range(4):
        for j in range(4):
            blind = sum(a == i for a, _ in pairs) * sum(b == j for _, b in pairs) / len(pairs) ** 2
            np.testing.assert_allclose(lift_EE[i, j], expected[i][j] / blind if blind else np.nan)


def test_independent_layers_have_lift_1_and_a_permutation_has_the_inverse_share():
    first_T, second_T = np.repeat([0, 1], 6), np.tile([0, 0, 1], 4)
    assert transition_lift(transitions(first_T, second_T, 2)) == pytest.approx(np.ones((2, 2)))
    permuted = transition_lift(transitions(first_T, 1 - first_T, 2))
    assert permuted.tolist() == [[0, 2], [2, 0]]


# Stability.


def test_churn_counts_other_first_choices_none_among_them():
    assert churn(np.array([0, 1, 2, NONE]), np.array([0, 2, NONE, NONE])) == 0.5
    assert np.isnan(churn(np.array([], int), np.array([], int)))


@given(SEEDS)
def test_saturation_is_the_mean_overlap_and_1_at_the_end(seed):
    then_TE, last_TE = (selected(*choices(seed + i), 5) for i in (0, 1))
    overlaps = [
        len(set(np.flatnonzero(then)) & set(np.flatnonzero(last))) / last.sum()
        for then, last in zip(then_TE, last_TE, strict=True)
        if last.any()
    ]
    assert saturation(then_TE, last_TE) == pytest.approx(np.mean(overlaps))
    assert saturation(last_TE, last_TE) == pytest.approx(1)
    assert 0 <= saturation(then_TE, last_TE) <= 1
    order = np.random.default_rng(seed).permutation(len(then_TE))
    assert saturation(then_TE[order], last_TE[order]) == pytest.approx(np.mean(overlaps))


def test_saturation_of_unrelated_choices_is_k_over_experts():
    experts = [choices(seed, num_tokens=20_000, num_experts=8, k=2)[0] for seed in (0, 1)]
    then_TE, last_TE = (selected(e, np.ones(e.shape), 8) for e in experts)
    assert saturation_by_chance(then_TE) == 0.25
    # Standard deviation of a token's overlap: sqrt(6/7 * 2 * 1/4 * 3/4) / 2 = 0.28.
    assert saturation(then_TE, last_TE) == pytest.approx(0.25, abs=5 * 0.28 / 20_000**0.5)
