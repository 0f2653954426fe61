"""Quantile balancing against loops and against the assignment whose prices it approximates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.types import Context, GateSpec
from tests.gates import stats_of

E = 6

quantile_prices = jax.jit(gating.quantile_prices, static_argnames="k")


def by_loops(h, price, k):
    """One coordinate-descent step, one token and one expert at a time, in float64."""
    tokens = len(h)
    alpha = [sorted(row - price, reverse=True)[k] for row in h]
    return np.array(
        [
            sorted((h[t, e] - alpha[t] for t in range(tokens)), reverse=True)[tokens * k // E]
            for e in range(E)
        ]
    )


@pytest.mark.parametrize(("tokens", "k"), [(30, 1), (30, 2), (31, 2), (4, 1), (17, 5)])
def test_prices_equal_quantiles_computed_in_loops(tokens, k):
    rng = np.random.default_rng(tokens * k)
    h, price = rng.normal(size=(tokens, E)), rng.normal(size=E)
    padded = np.concatenate([h, np.full((9, E), 50.0)])
    valid = np.arange(tokens + 9) < tokens
    order = rng.permutation(tokens + 9)  # padding may lie anywhere
    got = quantile_prices(
        jnp.asarray(padded[order], jnp.float32),
        jnp.asarray(price, jnp.float32),
        jnp.asarray(valid[order]),
        k,
    )
    np.testing.assert_allclose(got, by_loops(h, price, k), rtol=1e-5, atol=1e-5)  # float32


def test_with_all_tokens_thresholds_fixed_no_expert_exceeds_its_share():
    """T k / E tokens pass an expert's price, or fewer and some that are just at it."""
    tokens, k = 60, 2
    h = np.random.default_rng(0).normal(size=(tokens, E)) + np.linspace(0, 3, E)
    price = quantile_prices(jnp.asarray(h, jnp.float32), jnp.zeros(E), jnp.ones(tokens, bool), k)
    margin = h - np.sort(h, axis=1)[:, -k - 1, None] - np.asarray(price)
    above, at_or_above = ((margin > bound).sum(0) for bound in (1e-6, -1e-6))  # float32
    assert (above <= tokens * k // E).all() and (at_or_above > tokens * k // E).all()
    assert (above == tokens * k // E).sum() >= E // 2, "ties are the exception"


def test_all_experts_or_no_tokens_leave_nothing_to_balance():
    h = jnp.ones((4, E))
    for k, valid in ((E, jnp.ones(4, bool)), (2, jnp.zeros(4, bool))):
        np.testing.assert_array_equal(quantile_prices(h, jnp.ones(E), valid, k), 0)


@functools.partial(jax.jit, static_argnames="gate")
def run(gate, state, x, context):
    out = gate({"router_DE": jnp.eye(x.shape[-1])}, state, x, context)
    return gate.update(state, stats_of(out, context.valid_GT)), out


def step(gate, state, h, valid=None, rows=1):
    groups, tokens, experts = h.shape
    known = {} if valid is None else {"valid_BL": jnp.asarray(valid)}
    context = Context.of(groups, tokens, **known).grouped(rows, True)
    x = jnp.asarray(h, jnp.float32).reshape(groups // rows, rows * tokens, experts)
    return run(gate, state, x, context)


def test_the_next_prices_are_the_token_weighted_mean_over_groups():
    gate, k = gating.make("quantile"), 2
    h = np.random.default_rng(2).normal(size=(3, 24, E))
    counts = np.asarray([24, 11, 0])
    valid = np.arange(24)[None] < counts[:, None]
    price = np.linspace(-1, 1, E).astype(np.float32)
    state, _ = step(gate, {"price_E": jnp.asarray(price)}, h, valid)
    parts = [by_loops(h[g, : counts[g]], price, k) for g in (0, 1)]
    np.testing.assert_allclose(
        state["price_E"], np.average(parts, axis=0, weights=counts[:2]), rtol=1e-5, atol=1e-5
    )


def test_a_batch_without_valid_tokens_leaves_the_prices_unchanged():
    price_E = jnp.linspace(-1, 1, E)
    h = np.random.default_rng(6).normal(size=(2, 8, E))
    state, _ = step(gating.make("quantile"), {"price_E": price_E}, h, np.zeros((2, 8), bool))
    np.testing.assert_array_equal(state["price_E"], price_E)


def test_a_batch_is_routed_by_the_prices_in_the_state():
    gate = gating.make("quantile")
    h = np.random.default_rng(3).normal(size=(1, 40, E))
    price = jnp.asarray([5.0, 0, 0, 0, 0, 0])
    _, out = step(gate, {"price_E": price}, h)
    assert not (out.routing.expert_GTK == 0).any(), "its price is prohibitive"
    expert, _ = gating.top_k_routing(jnp.asarray(h, jnp.float32) - price, 2)
    np.testing.assert_array_equal(out.routing.expert_GTK, expert)
    # Weights are those of the logits: a price buys no weight.
    chosen = np.take_along_axis(h, np.asarray(expert), -1)
    wanted = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    np.testing.assert_allclose(out.routing.weight_GTK, wanted, rtol=1e-5)  # float32


def test_skewed_logits_are_balanced_within_a_few_steps_on_fresh_tokens():
    """The bias of loss-free balancing would need the gap over its rate: thousands of steps."""
    gate = gating.make("quantile")
    rng = np.random.default_rng(4)
    state = gate.init_state(GateSpec(E, E))
    violation = []
    for _ in range(12):
        h = rng.normal(size=(1, 6000, E)) + np.linspace(0, 3, E)
        state, out = step(gate, state, h)
        load = np.bincount(np.asarray(out.routing.expert_GTK).ravel(), minlength=E)
        violation.append(load.max() / load.mean() - 1)
    assert violation[0] > 1
    assert violation[-1] < 0.1


def test_prices_updated_repeatedly_on_one_batch_support_a_balanced_assignment():
    """k = 1: coordinate descent ends near the prices of BASE's solver; the load is theirs."""
    h = np.random.default_rng(5).normal(size=(120, E)).astype(np.float32) + np.linspace(0, 2, E)
    h = jnp.asarray(h, jnp.float32)
    valid = jnp.ones(120, bool)
    price = jax.lax.fori_loop(
        0, 200, lambda _, price: gating.quantile_prices(h, price, valid, 1), jnp.zeros(E)
    )
    load = np.bincount(np.asarray(jnp.argmax(h - price, axis=1)), minlength=E)
    best = jax.jit(gating.balanced_assignment)(h)
    exact = np.asarray(best.price_E - best.price_E.mean())
    assert load.max() / load.mean() - 1 < 0.1
    # Prices of a finite problem are intervals: 20 tokens an expert leave gaps of about 0.1.
    np.testing.assert_allclose(price - price.mean(), exact, atol=0.3)
