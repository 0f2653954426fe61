"""Expert choice: columns against numpy, slots and padding, the causal surrogates."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.gating import ExpertChoice, choose_tokens
from moejax.options import DispatchOptions
from moejax.types import Context, Visibility
from tests import gates
from tests.gates import D, E, G, T


def by_argsort(score_TE, count, valid_T):
    """The first ``count`` of each column in descending order, earlier tokens first among equals."""
    chosen = np.zeros(score_TE.shape, bool)
    for e in range(score_TE.shape[1]):
        order = np.argsort(-score_TE[:, e], kind="stable")
        chosen[[t for t in order if valid_T[t]][:count], e] = True
    return chosen


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "lone tokens"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 2.0, 8.0, 20.0])
def test_columns_equal_those_of_a_stable_argsort(kind, factor):
    rng = np.random.default_rng(0)
    choose = jax.jit(functools.partial(choose_tokens, factor=factor))
    for tokens in (1, 5, 40):
        score = rng.normal(size=(tokens, E)).astype(np.float32)
        if kind == "ties":
            score = np.round(score)
        elif kind == "constant":
            score[:] = 0.125
        valid = rng.random(tokens) < (0.2 if kind == "lone tokens" else 0.8)
        chosen, last = choose(score, valid_T=valid)
        n = int(valid.sum())
        count = min(n, math.ceil(round(factor * n / E, 9)))
        np.testing.assert_array_equal(chosen, by_argsort(score, count, valid))
        assert (np.asarray(chosen).sum(0) == count).all()
        if n:
            np.testing.assert_array_equal(last, np.where(chosen, score, np.inf).min(0))


def test_a_later_token_displaces_an_earlier_one():
    """Eight tokens, one expert with four slots (a published example of the leak)."""
    score = jnp.asarray([0.81, 0.22, 0.55, 0.19, 0.60, 0.91, 0.14, 0.58])[:, None]

    def taken(tokens):
        chosen, last = choose_tokens(score[:tokens], 4 / tokens)
        return np.flatnonzero(chosen[:, 0]) + 1, last.item()

    whole, last = taken(8)
    np.testing.assert_array_equal(whole, [1, 5, 6, 8])
    assert last == pytest.approx(0.58)
    prefix, _ = taken(5)
    assert 3 in prefix and 3 not in whole


def test_every_expert_is_filled_and_weights_are_probabilities():
    gate = ExpertChoice(factor=1.5)
    params, given = gates.drawn(gate), gates.context(True)
    out = gate(params, (), gates.tokens(), given)
    logits = np.asarray(gates.tokens()) @ np.asarray(params["router_DE"])
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weight = np.asarray(out.routing.weight_GTK)
    for g in range(G):
        chosen = by_argsort(probs[g], 3, np.ones(T, bool))
        np.testing.assert_array_equal(weight[g] > 0, chosen)
        np.testing.assert_allclose(weight[g], np.where(chosen, probs[g], 0), rtol=2e-5)
    visits = (weight > 0).sum(-1)
    assert visits.mean() == 1.5 and visits.min() == 0 and visits.max() > 2
    assert gate.capacity(T, E, 0.1) == gate.capacity(T, E, 9.0) == 3, "of any capacity factor"
    causal = ExpertChoice(factor=1.5, eval_policy="threshold")
    assert causal.capacity(T, E, 0.1) == causal.capacity(T, E, 9.0) == 3, "in evaluation as well"
    throughout = ExpertChoice(factor=1.5, policy="threshold", eval_policy="threshold")
    assert throughout.capacity(T, E, 0.5) == 2 and throughout.capacity(T, E, 2.0) == 6
    evaluated = ExpertChoice(factor=1.5, policy="threshold", eval_policy="choice")
    assert evaluated.capacity(T, E, 0.5) == 3, "room for what the evaluation's choice fills"
    assert evaluated.capacity(T, E, 2.0) == 6


def test_padding_is_not_chosen_and_takes_no_slots():
    gate = ExpertChoice()
    params = gates.drawn(gate)
    valid = jnp.arange(T)[None] < jnp.asarray([T, 9, 1, 0])[:, None]
    x = jnp.where(valid[..., None], gates.tokens(), 0)
    weight = gate(params, (), x, gates.context(True, valid_BL=valid)).routing.weight_GTK
    load = (weight > 0).sum(1)
    np.testing.assert_array_equal(load, np.repeat([[4], [3], [1], [0]], E, axis=1))
    short = gates.context(True)
    short = dataclasses.replace(
        short,
        **{f: getattr(short, f)[:, :9] for f in ("token_GT", "position_GT", "segment_GT")},
        valid_GT=short.valid_GT[:, :9],
    )
    alone = gate(params, (), x[:, :9], short).routing.weight_GTK
    # The same tokens without the padding behind them: products of other shapes, an ulp.
    np.testing.assert_allclose(alone[1], weight[1, :9], rtol=1e-5)


def test_a_bound_per_token_keeps_the_heaviest_and_counts_the_rest():
    gate = ExpertChoice(factor=4.0, max_active=2)
    whole = dataclasses.replace(gate, max_active=0)
    params, given = gates.drawn(gate), gates.context(True)
    out, free = (g(params, (), gates.tokens(), given) for g in (gate, whole))
    assert out.cut_GTE is not None
    for g, t in np.ndindex(G, T):
        wanted = np.asarray(free.routing.weight_GTK[g, t])
        best = np.sort(wanted)[::-1][:2]
        np.testing.assert_array_equal(out.routing.weight_GTK[g, t], best)
        assert out.cut_GTE[g, t].sum() == max((wanted > 0).sum() - 2, 0)
    assert out.cut_GTE.any()


ROWS = 64
"""Sequences in the one group of the tests of thresholds, so that a quantile is one."""


def grouped(step, train):
    x = gates.tokens(step, ROWS).reshape(1, ROWS * T, D)
    return x, gates.context(train, groups=ROWS, rows=ROWS)


def train(gate, params, state, steps):
    """State after some updates, and the C-th largest probabilities on the way."""
    seen = []
    for step in range(steps):
        x, given = grouped(step, True)
        out = gate(params, state, x, given)
        seen.append(np.sort(np.asarray(out.stats.probs_GTE), axis=1)[0, -ROWS * T * 2 // E])
        state = gate.update(state, gates.stats_of(out, given.valid_GT))
    return state, seen


@pytest.mark.parametrize("policy", ["choice", "threshold"])
def test_the_threshold_is_the_moving_average_of_the_last_score_that_is_chosen(policy):
    gate = ExpertChoice(policy=policy, eval_policy="threshold", ema_decay=0.6)
    params = gates.drawn(gate)
    state, seen = train(gate, params, gate.init_state(gates.spec()), 5)
    # A plain mean until its decay n/(n+1) passes 0.6 at the third update, then the EMA.
    mean = (seen[0] + seen[1]) / 2
    for value in seen[2:]:
        mean = 0.6 * mean + 0.4 * value
    np.testing.assert_allclose(state["threshold_E"], mean, rtol=1e-4)
    assert state["updates"] == 5

    out = gate(params, state, *grouped(9, False))
    passed = np.asarray(out.stats.probs_GTE) >= np.asarray(state["threshold_E"])
    np.testing.assert_array_equal(out.routing.weight_GTK > 0, passed)
    # A share of 1/4 of 1024 tokens has std 0.0135, the sum over 8 experts of two such 0.05.
    assert abs(passed.sum(-1).mean() - 2.0) < 0.25


def test_a_probability_at_the_threshold_passes_it():
    """Before the first step both are exactly 1 / E with a router of zeros."""
    gate = ExpertChoice(eval_policy="threshold")
    params = jax.tree.map(jnp.zeros_like, gates.drawn(gate))
    state = gate.init_state(gates.spec())
    out = jax.jit(lambda x: gate(params, state, x, gates.context(False)))(gates.tokens())
    assert (out.routing.weight_GTK == 1 / E).all()


def test_positions_are_chosen_among_the_sequences_of_a_group():
    rows, count = 8, 2  # ceil(2 * 8 / 8)
    gate = ExpertChoice(policy="position", eval_policy="position")
    params = gates.drawn(gate)
    x = gates.tokens(groups=rows).reshape(1, rows * T, D)
    valid = jnp.arange(T)[None] < jnp.asarray([T] * 6 + [4, 0])[:, None]
    given = Context.of(rows, T, valid_BL=valid).grouped(rows, False)
    out = gate(params, (), x, given)
    # A sequence of four tokens has them at the same positions behind padding.
    late = jnp.roll(x.reshape(rows, T, D)[6], 5, axis=0)
    moved = x.reshape(rows, T, D).at[6].set(late).reshape(1, rows * T, D)
    behind = Context.of(rows, T, valid_BL=valid.at[6].set(jnp.roll(valid[6], 5)))
    shifted = gate(params, (), moved, behind.grouped(rows, False)).routing.weight_GTK
    shifted = shifted.reshape(rows, T, E)
    shifted = shifted.at[6].set(jnp.roll(shifted[6], -5, axis=0))
    np.testing.assert_allclose(shifted.reshape(1, -1, E), out.routing.weight_GTK, rtol=1e-6)
    probs = np.asarray(out.stats.probs_GTE).reshape(rows, T, E)
    weight = np.asarray(out.routing.weight_GTK).reshape(rows, T, E)
    for t in range(T):
        ok = np.asarray(valid[:, t])
        chosen = by_argsort(probs[:, t], math.ceil(2 * ok.sum() / 8), ok)
        np.testing.assert_array_equal(weight[:, t] > 0, chosen)
    assert gate.capacity(rows * T, E, 0.1) == rows * T, "any sequence may take all of an expert"
    assert count == (weight[:, 0] > 0).sum(0).max()


DECLARED = {
    ("choice", "choice", "sequence"): (True, False, True, False),
    ("choice", "choice", "4"): (True, True, True, True),
    ("choice", "threshold", "sequence"): (True, False, False, False),
    ("threshold", "threshold", "batch"): (False, False, False, False),
    ("position", "position", "4"): (False, True, False, True),
    ("position", "threshold", "4"): (False, True, False, False),
}


@pytest.mark.parametrize(("policy", "eval_policy", "group"), DECLARED)
def test_each_phase_has_the_visibility_of_its_policy(policy, eval_policy, group):
    gate = ExpertChoice(policy=policy, eval_policy=eval_policy)
    moe = DispatchOptions(num_experts=E, transport="dropless", group=group).config
    assert gate.visibility(moe) == Visibility(*DECLARED[policy, eval_policy, group])


def test_experts_that_take_all_tokens_leak_nothing():
    gate = ExpertChoice(factor=8.0)
    assert gate.visibility(DispatchOptions(num_experts=E, group="4").config) == Visibility()
    assert (
        gate(gates.drawn(gate), (), gates.tokens(), gates.context(True)).routing.weight_GTK > 0
    ).all()


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"factor": 0.0}, "gate.factor=0.0"),
        ({"policy": "top"}, "gate.policy='top' is unknown; use one of choice"),
        ({"eval_policy": "ema"}, "gate.eval_policy='ema'"),
        ({"ema_decay": 1.0}, "gate.ema_decay=1.0"),
        ({"max_active": 9}, "gate.max_active=9"),
    ],
)
def test_fields_out_of_range_are_refused(fields, part):
    with pytest.raises(ValueError, match=part.replace("(", r"\(")):
        ExpertChoice(**fields).check(E, train=True)
