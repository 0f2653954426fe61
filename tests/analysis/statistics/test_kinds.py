"""The kinds of tokens of each expert, and the information of a kind about the expert."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moejax.analysis.statistics import kinds
from moejax.analysis.statistics.kinds import (
    favourites,
    lift,
    peak_share,
    share_of_kind,
)
from moejax.record.counts import pair_counts

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = np.array([[8, 2], [1, 9], [0, 0], [3, 1]])
"""Four kinds and two experts; one choice each, so kinds have 10, 10, 0 and 4 tokens."""
TOKENS = COUNTS.sum(axis=1)


def drawn(seed: int, num_tokens: int = 60, num_experts: int = 4, num_kinds: int = 3):
    random = np.random.default_rng(seed)
    return random.random((num_tokens, num_experts)) < 0.4, random.integers(num_kinds, size=60)


@given(SEEDS)
def test_pair_counts_equal_those_of_a_loop_in_any_order(seed):
    selected_TE, kind_T = drawn(seed)
    counts_CE = pair_counts(selected_TE, kind_T, 3)
    expected = np.zeros((3, 4), int)
    for row, kind in zip(selected_TE, kind_T, strict=True):
        expected[kind] += row
    np.testing.assert_array_equal(counts_CE, expected)
    np.testing.assert_array_equal(pair_counts(selected_TE[::-1], kind_T[::-1], 3), expected)
    share_CE = share_of_kind(counts_CE)
    used_C = expected.any(axis=1)
    np.testing.assert_allclose(share_CE.sum(axis=1)[used_C], 1)
    assert np.isnan(share_CE[~used_C]).all()


def test_lift_by_hand():
    np.testing.assert_allclose(share_of_kind(COUNTS)[:2], [[0.8, 0.2], [0.1, 0.9]])
    np.testing.assert_allclose(lift(COUNTS)[[0, 1, 3]], [[1.6, 0.4], [0.2, 1.8], [1.5, 0.5]])
    assert np.isnan(lift(COUNTS)[2]).all()
    assert np.isnan(lift(np.array([[1, 0], [1, 0]]))[:, 1]).all()


def test_favourites_are_frequent_kinds_of_lift_above_1_best_first():
    first, second = favourites(COUNTS, TOKENS, least=4, most=5)
    assert [(f.kind, f.pairs) for f in first + second] == [(0, 8), (3, 3), (1, 9)]
    assert [f.lift for f in first + second] == pytest.approx([1.6, 1.5, 1.8])
    assert [f.kind for f in favourites(COUNTS, TOKENS, least=5, most=5)[0]] == [0]
    assert [f.kind for f in favourites(COUNTS, TOKENS, least=4, most=1)[0]] == [0]
    assert favourites(COUNTS, TOKENS, least=11, most=5) == [[], []]


def test_kinds_of_lift_1_are_not_favourites():
    counts = np.array([[2, 6], [1, 3]])
    assert lift(counts).tolist() == [[1, 1], [1, 1]]
    assert favourites(counts, counts.sum(axis=1), least=1, most=5) == [[], []]


def test_the_peak_share_is_a_mean_over_frequent_kinds():
    assert peak_share(COUNTS, TOKENS, least=1) == pytest.approx((0.8 + 0.9 + 0.75) / 3)
    assert peak_share(COUNTS, TOKENS, least=10) == pytest.approx((0.8 + 0.9) / 2)
    assert math.isnan(peak_share(COUNTS, TOKENS, least=11))


# Information.


@given(SEEDS)
def test_information_is_the_divergence_from_independence(seed):
    counts_CE = np.random.default_rng(seed).integers(0, 9, (3, 4))
    counts_CE[0, 0] += 1
    joint = counts_CE / counts_CE.sum()
    product = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    expected = stats.entropy(joint.ravel(), product.ravel())
    assert kinds.mutual_information(counts_CE) == pytest.approx(expected, abs=1e-9)


@given(SEEDS)
def test_what_a_kind_explains_is_the_information_of_a_table_over_the_entropy(seed):
    selected_TE, kind_T = drawn(seed)
    counts_CE = pair_counts(selected_TE, kind_T, 3)
    entropy = stats.entropy(counts_CE.sum(axis=0))
    expected = kinds.mutual_information(counts_CE) / entropy
    assert kinds.explained(selected_TE, kind_T) == pytest.approx(expected, abs=1e-9)


@given(SEEDS)
def test_the_explained_share_is_between_0_and_1_and_ignores_order_and_names(seed):
    selected_TE, kind_T = drawn(seed)
    value = kinds.explained(selected_TE, kind_T)
    assert 0 <= value <= 1
    order = np.random.default_rng(seed).permutation(len(kind_T))
    assert kinds.explained(selected_TE[order], kind_T[order]) == pytest.approx(value)
    assert kinds.explained(selected_TE, 10 - 3 * kind_T) == pytest.approx(value)


def test_a_deciding_kind_explains_everything_and_constant_choices_are_undefined():
    kind_T = np.arange(12) % 4
    assert kinds.explained(np.eye(4, dtype=bool)[kind_T], kind_T) == pytest.approx(1)
    assert math.isnan(kinds.explained(np.eye(4, dtype=bool)[0 * kind_T], kind_T))
    assert math.isnan(kinds.explained(np.zeros((0, 4), bool), kind_T[:0]))
    pairs_TE = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)[kind_T % 2]
    assert kinds.explained(pairs_TE, kind_T) == pytest.approx(1 - math.log(2) / math.log(4))


def test_shuffled_kinds_explain_what_many_kinds_explain_by_chance():
    random = np.random.default_rng(0)
    selected_TE = np.eye(4, dtype=bool)[random.integers(4, size=4000)]
    kind_T = random.integers(20, size=4000)
    found = kinds.explained_by_chance(selected_TE, kind_T, repeats=50, seed=1)
    # The plug-in estimate's bias, (C - 1)(E - 1) / 2P nats.
    assert found.mean() == pytest.approx(19 * 3 / 8000 / math.log(4), rel=0.1)
    assert found.min() < kinds.explained(selected_TE, kind_T) < found.max()
    np.testing.assert_array_equal(kinds.explained_by_chance(selected_TE, kind_T, 50, 1), found)
    decided_TE = np.eye(4, dtype=bool)[kind_T % 4]
    assert kinds.explained_by_chance(decided_TE, kind_T, 20, 0).max() < 0.02
