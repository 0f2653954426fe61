"""Sinkhorn plans against POT, and the identities that S-BASE rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.gating import balanced_assignment, sinkhorn_bias, sinkhorn_plan

WORKED = jnp.asarray([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.5, 0.4]])


def normal(tokens, num_experts, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=(tokens, num_experts)), jnp.float32)


def by_pot(score_TE, epsilon):
    """POT's log-domain Sinkhorn in float64, to convergence."""
    rows, columns = score_TE.shape
    plan = ot.sinkhorn(
        np.full(rows, 1 / rows), np.full(columns, 1 / columns), -np.asarray(score_TE, np.float64),
        reg=epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-13,
    )  # fmt: skip
    return np.asarray(plan)


@pytest.mark.quick(1)
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(40, 6), (7, 9), (12, 1)])
def test_the_plan_equals_that_of_pot(shape, epsilon):
    score = normal(*shape)
    plan = sinkhorn_plan(score, epsilon=epsilon, num_iters=2000)
    # float32 against float64 on entries of about 1 / (T E).
    np.testing.assert_allclose(plan, by_pot(score, epsilon), rtol=2e-4, atol=1e-7)


def test_the_worked_example_is_reproduced():
    plan = sinkhorn_plan(WORKED, num_iters=500)
    wanted = [[0.0932, 0.1568], [0.1544, 0.0956], [0.2037, 0.0463], [0.0487, 0.2013]]
    np.testing.assert_allclose(plan, wanted, atol=5e-5)  # the digits given
    bias = sinkhorn_bias(WORKED, num_iters=500)
    np.testing.assert_allclose(bias[1] - bias[0], 1.5198, atol=5e-5)
    np.testing.assert_array_equal(np.argmax(plan, 1), [1, 0, 0, 1])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.1, 30.0), st.integers(1, 50))
def test_rows_are_exact_after_any_number_of_iterations(seed, scale, num_iters):
    plan = sinkhorn_plan(normal(16, 5, seed, scale), num_iters=num_iters)
    np.testing.assert_allclose(plan.sum(1), 1 / 16, rtol=1e-6)  # a float32 softmax
    assert (plan >= 0).all()


def test_columns_are_exact_at_convergence():
    np.testing.assert_allclose(sinkhorn_plan(normal(64, 8), num_iters=300).sum(0), 1 / 8, rtol=1e-5)


def test_logits_far_beyond_the_range_of_exp_give_a_balanced_plan():
    """exp(1000) overflows; so does exp(89). The reference implementations return NaN."""
    score = normal(32, 4, scale=300.0) + 1000.0
    plan = sinkhorn_plan(score, num_iters=3000)
    assert np.isfinite(plan).all()
    np.testing.assert_allclose(plan.sum(1), 1 / 32, rtol=1e-6)
    np.testing.assert_allclose(plan.sum(0), 1 / 4, rtol=1e-2)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("num_iters", [1, 2, 7, 40])
def test_iterations_equal_the_formula_at_every_scale_of_scores(scale, num_iters):
    """With and without exponentials: at 300 most leave float32's range, at 0.3 none does."""
    score = normal(64, 8, scale=scale)
    bias = np.zeros(8)
    for _ in range(num_iters):
        logit = np.asarray(score, np.float64) + bias
        log_row = logit - np.logaddexp.reduce(logit, axis=1, keepdims=True)
        bias += np.log(1 / 8) - (np.logaddexp.reduce(log_row, axis=0) - np.log(64))
    got = sinkhorn_bias(score, num_iters=num_iters)
    # float32 rounds scores of this size by 1e-7 of them, and biases grow as large.
    np.testing.assert_allclose(got, bias - bias.mean(), atol=1e-5 * max(scale, 1.0))


def test_the_plan_routes_as_top_1_with_the_bias():
    """A row's factor changes no comparison within the row."""
    score = normal(200, 8)
    bias, plan = sinkhorn_bias(score, num_iters=20), sinkhorn_plan(score, num_iters=20)
    np.testing.assert_array_equal(np.argmax(plan, 1), np.argmax(score + bias, 1))
    assert (np.argmax(plan, 1) != np.argmax(score, 1)).any()
    np.testing.assert_allclose(jnp.mean(bias), 0.0, atol=1e-6)


@pytest.mark.slow
def test_a_small_epsilon_gives_the_balanced_assignment():
    """The dual of the plan goes to that of the assignment, and so does its value."""
    score = normal(64, 4)
    exact = balanced_assignment(score)
    # 64 tokens move the price of an expert by about 1/16 each: far more than epsilon.
    plan = np.asarray(sinkhorn_plan(score, epsilon=1e-3, num_iters=20_000))
    best = score[jnp.arange(64), exact.expert_T].mean()
    np.testing.assert_allclose((plan * score).sum(), best, atol=2e-3)
    agree = (np.argmax(plan, 1) == exact.expert_T).mean()
    assert agree > 0.95


def test_a_large_epsilon_gives_a_uniform_plan():
    np.testing.assert_allclose(sinkhorn_plan(normal(8, 4), epsilon=1e6), 1 / 32, rtol=1e-4)


def test_constants_added_to_rows_and_columns_change_nothing():
    score = normal(40, 6)
    plan = sinkhorn_plan(score, num_iters=400)
    shifted = score + normal(40, 1, 1) + normal(1, 6, 2)
    # float32 rounding of the shifted scores.
    np.testing.assert_allclose(sinkhorn_plan(shifted, num_iters=400), plan, rtol=1e-4)


def test_invalid_tokens_take_no_part():
    score, valid = normal(40, 6), np.arange(40) % 3 > 0
    poisoned = jnp.where(valid[:, None], score, 1e9)
    plan = sinkhorn_plan(poisoned, num_iters=200, valid_T=jnp.asarray(valid))
    np.testing.assert_allclose(plan[valid], sinkhorn_plan(score[valid], num_iters=200), rtol=1e-5)
    assert (plan[~valid] == 0).all()
    empty = sinkhorn_plan(score, valid_T=jnp.zeros(40, bool))
    assert (empty == 0).all()


def test_a_tolerance_stops_each_group_early_and_independently():
    easy, hard = normal(64, 8, scale=0.1), normal(64, 8, scale=8.0)

    def column_error(score, tol, num_iters=500):
        plan = sinkhorn_plan(score, tol=tol, num_iters=num_iters)
        return float(np.abs(plan.sum(0) * 8 - 1).max())

    assert 1e-5 < column_error(hard, 1e-2) <= 1.01e-2  # the bound, and not much better
    assert column_error(easy, 1e-2, num_iters=3) <= 1e-2
    both = jax.vmap(lambda s: sinkhorn_bias(s, tol=1e-3))(jnp.stack([easy, hard]))
    np.testing.assert_array_equal(both[0], sinkhorn_bias(easy, tol=1e-3))


def test_no_gradient_flows_through_the_bias():
    grad = jax.grad(lambda s: jnp.sum(sinkhorn_bias(s) ** 2))(normal(8, 4))
    assert (grad == 0).all()
