"""The balanced assignment is optimal, balanced and certified, on every kind of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moejax.gating import balanced_assignment
from moejax.gating.solvers import assignment

solve = jax.jit(assignment.solve)


def scores(kind, tokens, num_experts, seed=0):
    """The kinds that break auctions: ties, duplicates, few dimensions, outliers."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(tokens, num_experts))
    few_rows = rng.normal(size=(6, num_experts))
    made = {
        "normal": normal,
        "skewed": normal + np.linspace(0, 4, num_experts),
        "clustered": few_rows[rng.integers(0, 6, tokens)] + 0.05 * normal,
        "low_rank": rng.normal(size=(tokens, 2)) @ rng.normal(size=(2, num_experts)),
        "rank_one": rng.normal(size=(tokens, 1)) * rng.normal(size=num_experts),
        "integer": rng.integers(0, 4, normal.shape),
        "duplicates": few_rows[rng.integers(0, 6, tokens)],
        "half_duplicates": np.where(np.arange(tokens)[:, None] % 2, few_rows[0], normal),
        "constant": np.full(normal.shape, 2.5),
        "one_column": normal * (np.arange(num_experts) == 0) * 50,
        "outlier": normal * np.where(np.arange(tokens)[:, None] == 0, 1e4, 1),
    }
    return jnp.asarray(made[kind], jnp.float32)


KINDS = ["normal", "skewed", "clustered", "low_rank", "rank_one", "integer", "duplicates",
         "half_duplicates", "constant", "one_column", "outlier"]  # fmt: skip


def optimum(score_TE):
    """By scipy: each expert has T // E obligatory slots and one that only T % E may use."""
    score_TE = np.asarray(score_TE, np.float64)
    tokens, num_experts = score_TE.shape
    share = tokens // num_experts
    expert = np.concatenate([np.repeat(np.arange(num_experts), share), np.arange(num_experts)])
    value = score_TE[:, expert]
    if tokens % num_experts == 0:
        value, expert = value[:, :tokens], expert[:tokens]
    else:
        bonus = 4 * np.abs(score_TE).max() * tokens + 1  # so that obligatory slots are filled
        value = value + bonus * (np.arange(expert.size) < num_experts * share)
    row, column = linear_sum_assignment(value, maximize=True)
    return score_TE[row, expert[column]].sum()


def check(score_TE, valid_T=None):
    """Balance, prices, gap; returns what the best assignment would gain over ours."""
    result, rounds = solve(score_TE, valid_T)
    valid = np.ones(len(score_TE), bool) if valid_T is None else np.asarray(valid_T)
    expert, price = np.asarray(result.expert_T), np.asarray(result.price_E, np.float64)
    score = np.asarray(score_TE, np.float64)
    assert (expert[~valid] == -1).all() and (expert[valid] >= 0).all()
    counts = np.bincount(expert[valid], minlength=score.shape[1])
    assert counts.sum() == valid.sum() and counts.max() - counts.min() <= 1
    assert rounds <= score.size
    net = score[valid] - price
    spread = np.ptp(score[valid], axis=1).max(initial=0.0)
    # One unit of the solver, and the rounding of float32 prices and scores.
    tie = 1e-6 * (spread + np.abs(score[valid]).max(initial=0.0)) + 1e-30
    assert (net.max(1) - net[np.arange(len(net)), expert[valid]] <= tie).all()
    ours = score[valid, expert[valid]].sum()
    best = optimum(score[valid]) if valid.any() else 0.0
    assert best - ours <= float(result.gap) + tie, "the gap bounds what a better one could gain"
    assert 0 <= float(result.gap) <= tie * max(valid.sum(), 1)
    return (best - ours) / max(spread * valid.sum(), 1e-30)


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "num_experts"), [(96, 8), (101, 8), (5, 8), (48, 3)])
def test_the_assignment_is_optimal_according_to_scipy(kind, tokens, num_experts):
    # 2^-29 of the spread per token is the solver's resolution; 1e-7 is that of the float32 input.
    assert abs(check(scores(kind, tokens, num_experts))) < 1e-7


@pytest.mark.parametrize("kind", ["normal", "duplicates", "rank_one"])
def test_the_assignment_is_optimal_where_many_exchanges_are_needed(kind):
    assert abs(check(scores(kind, 512, 16))) < 1e-7


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(24, 5), (16, 1), (3, 7), (40, 4)]),
    st.integers(0, 3),
    st.integers(0, 2**31 - 1),
    st.floats(0, 1),
)
def test_assignments_with_ties_and_padding_are_balanced_and_optimal(shape, levels, seed, share):
    """Scores of few distinct values, so that most tokens tie; a random part of them valid."""
    rng = np.random.default_rng(seed)
    value = jnp.asarray(rng.integers(0, levels + 1, shape), jnp.float32)
    check(value, jnp.asarray(rng.random(shape[0]) < share))


def test_the_worked_example_is_reproduced():
    result = balanced_assignment(jnp.asarray([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.5, 0.4]]))
    np.testing.assert_array_equal(result.expert_T, [1, 0, 0, 1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_scores_are_solved_as_in_float32(dtype):
    """float16 made the reference auction stall: its increment fell below one ulp of the price."""
    half = jnp.asarray(scores("skewed", 96, 8), dtype)
    wide = solve(half.astype(jnp.float32), None)[0]
    np.testing.assert_array_equal(solve(half, None)[0].expert_T, wide.expert_T)
    check(half.astype(jnp.float32))


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_non_finite_scores_count_as_the_lowest_or_the_highest(bad):
    clean = scores("normal", 24, 4)
    value = clean.at[3, 1].set(bad)
    finite = value[jnp.isfinite(value)]
    clean = clean.at[3, 1].set(finite.max() if bad == np.inf else finite.min())
    result, clean_result = solve(value, None)[0], solve(clean, None)[0]
    np.testing.assert_array_equal(result.expert_T, clean_result.expert_T)
    assert np.isfinite(result.gap)
    hopeless = solve(jnp.full((24, 4), bad), None)[0]
    assert (np.bincount(hopeless.expert_T) == 6).all()


def test_constants_added_to_rows_and_columns_change_no_assignment():
    """Integers, so that the sums are exact and every tie stays one."""
    value = scores("integer", 96, 8)
    rng = np.random.default_rng(1)
    base = solve(value, None)[0].expert_T
    rows = value + rng.integers(-5, 5, (96, 1))
    np.testing.assert_array_equal(solve(rows, None)[0].expert_T, base)
    total = value[np.arange(96), base].sum()
    columns = value + rng.integers(-5, 5, 8)
    shifted = solve(columns, None)[0].expert_T
    assert value[np.arange(96), shifted].sum() == total


def test_without_ties_permuting_tokens_permutes_the_assignment():
    value = scores("normal", 96, 8)
    order = np.random.default_rng(2).permutation(96)
    base = np.asarray(solve(value, None)[0].expert_T)
    np.testing.assert_array_equal(solve(value[order], None)[0].expert_T, base[order])


def test_solving_a_batch_equals_solving_its_members_alone():
    """Groups finish after different numbers of rounds; the others must not continue."""
    kinds = ["normal", "duplicates", "constant", "rank_one"]
    value = jnp.stack([scores(kind, 96, 8) for kind in kinds])
    valid = jnp.asarray(np.random.default_rng(0).random((4, 96)) < 0.9)
    batch, rounds = jax.jit(jax.vmap(assignment.solve))(value, valid)
    assert len(set(rounds.tolist())) > 1
    for i in range(4):
        alone = solve(value[i], valid[i])[0]
        np.testing.assert_array_equal(batch.expert_T[i], alone.expert_T)
        # Whole numbers, but for their last conversion to float32.
        np.testing.assert_allclose(batch.price_E[i], alone.price_E, rtol=1e-6, atol=1e-7)


def test_an_empty_group_is_solved():
    assert balanced_assignment(jnp.zeros((0, 4))).expert_T.shape == (0,)
    result = balanced_assignment(jnp.zeros((3, 2)), jnp.zeros(3, bool))
    np.testing.assert_array_equal(result.expert_T, [-1, -1, -1])


def test_equal_tokens_are_spread_by_the_exchange_in_few_rounds():
    """Bulk moves: one token at a time would take hundreds."""
    for kind in ("constant", "duplicates", "integer"):
        _, rounds = solve(scores(kind, 512, 16), None)
        assert rounds <= 40, (kind, int(rounds))
