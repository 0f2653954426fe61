"""Rerouted overflow: against a plain loop, and through the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.dispatch.pack import plan_cells, serving_order
from moejax.dispatch.reroute import reroute
from moejax.gating import top_k_routing
from tests import meshes, moes

G, T, E = 3, 12, 4
CASES = [(k, p, r) for k in (1, 2) for p in ("position", "choice", "gate") for r in (1, 3)]


def loop(expert, weight, prob, score, *, capacity, priority, rounds):
    """One group with lists and dicts."""
    tokens, columns = expert.shape
    order = np.asarray(serving_order(priority, jnp.asarray(score[None]), columns))[0]
    room, lost = [capacity] * prob.shape[1], set()
    expert, weight = expert.copy(), weight.copy()
    visits = [set(row) for row in expert]
    for pair in order:
        t, k = divmod(int(pair), columns)
        if room[expert[t, k]]:
            room[expert[t, k]] -= 1
        else:
            lost.add((t, k))
    by_score = range(tokens)
    if priority == "gate":
        by_score = sorted(by_score, key=lambda t: -score[t])
    for _ in range(rounds):
        for k in range(columns):
            before = list(room)
            for t in by_score:
                free = [e for e in range(prob.shape[1]) if before[e] and e not in visits[t]]
                if (t, k) not in lost or not free:
                    continue
                best = max(free, key=lambda e: prob[t, e])
                if room[best]:
                    room[best] -= 1
                    weight[t, k] *= prob[t, best] / prob[t, expert[t, k]]
                    expert[t, k] = best
                    visits[t].add(best)
                    lost.remove((t, k))
    return expert, weight, len(lost)


@functools.cache
def example(k):
    skew = jnp.asarray([2.0, 1.0, 0.0, 0.0])
    logits = jax.random.normal(jax.random.key(k), (G, T, E)) + skew
    expert, weight = top_k_routing(logits, k, renormalize=False)
    return expert, weight, jax.nn.softmax(logits), jax.random.uniform(jax.random.key(9), (G, T))


@pytest.mark.quick(3)
@pytest.mark.parametrize(("k", "priority", "rounds"), CASES)
def test_rerouted_overflow_equals_a_plain_loop_and_displaces_no_other_token(k, priority, rounds):
    expert, weight, prob, score = example(k)
    capacity = T * k // E
    keywords = {"capacity": capacity, "priority": priority}
    got, got_weight = reroute(expert, weight, prob, score, rounds=rounds, **keywords)
    planned = {"num_experts": E, **keywords}
    before = plan_cells(expert, weight, score, **planned).kept_tK.reshape(expert.shape)
    after = plan_cells(got, got_weight, score, **planned).kept_tK.reshape(expert.shape)
    assert after[before].all() and after.sum() > before.sum()
    lost = 0
    for g in range(G):
        given = [np.asarray(a[g]) for a in (expert, weight, prob, score)]
        want = loop(*given, capacity=capacity, priority=priority, rounds=rounds)
        np.testing.assert_array_equal(got[g], want[0])
        np.testing.assert_allclose(got_weight[g], want[1], rtol=1e-6)  # a float32 product
        lost += want[2]
    assert lost == (~after).sum()


@pytest.mark.parametrize(
    ("second", "weight", "prob", "wanted", "new_weight"),
    [
        (2, 0.5, [0.5, 0.25, 0.25], 1, 0.25),
        (1, 0.5, [0.5, 0.25, 0.25], 1, 0.25),  # a column of weight 0 visits nobody
        (2, 0.5, [1.0, 0.0, 0.0], 0, 0.5),  # nobody else has a chance: it stays, to be dropped
        (2, 1e-20, [1.0, 1e-30, 0.0], 1, np.finfo(np.float32).tiny),  # not 0: it is sent
    ],
)
def test_the_second_token_of_a_full_expert_moves_as_worked_out_by_hand(
    second, weight, prob, wanted, new_weight
):
    """Both want expert 0, which has one slot."""
    expert_GTK = jnp.asarray([[[0, 1], [0, second]]], jnp.int32)
    weight_GTK = jnp.asarray([[[0.5, 0.0], [weight, 0.0]]], jnp.float32)
    prob_GTE = jnp.asarray([[[0.5, 0.5, 0.0], prob]], jnp.float32)
    choices = {"capacity": 1, "priority": "position", "rounds": 2}
    got, got_weight = reroute(expert_GTK, weight_GTK, prob_GTE, jnp.zeros((1, 2)), **choices)
    np.testing.assert_array_equal(got, [[[0, 1], [wanted, second]]])
    np.testing.assert_allclose(got_weight, [[[0.5, 0.0], [new_weight, 0.0]]], rtol=1e-6)


def test_rerouted_top_1_tokens_are_weighted_by_the_probability_of_their_new_expert():
    expert, weight, prob, score = example(1)
    got, got_weight = reroute(
        expert, weight, prob, score, capacity=3, priority="position", rounds=3
    )
    assert (got != expert).any()
    wanted = jnp.take_along_axis(prob, got, axis=-1)
    np.testing.assert_allclose(got_weight, wanted, rtol=1e-6)  # float32: w p_j / p_e


def test_nothing_moves_if_every_pair_has_room():
    expert, weight, prob, score = example(2)
    got = reroute(expert, weight, prob, score, capacity=T, priority="choice", rounds=2)
    np.testing.assert_array_equal(got[0], expert)
    np.testing.assert_array_equal(got[1], weight)


def test_a_layer_reports_the_routing_it_sent_and_counts_the_gates_choices():
    """Four equal tokens want experts 0 and 1, with two slots each: two of them move to 2 and 3."""
    layer = moejax.MoE(
        4, 8, E, gate=gating.make("mixtral"), capacity_factor=1.0, reroute=1, rngs=nnx.Rngs(0)
    )
    layer.router["router_DE"][...] = jnp.diag(jnp.asarray([3.0, 2.0, 1.0, 0.0]))
    _, info = jax.jit(lambda x_BLD: layer(x_BLD))(jnp.ones((1, 4, 4)))
    np.testing.assert_array_equal(info.routing.expert_GTK, [[[0, 1], [0, 1], [2, 3], [2, 3]]])
    assert info.kept_GTK.all()
    np.testing.assert_array_equal(info.stats.load_E, [4, 4, 0, 0])
    assert info.stats.gate["rerouted"] == 4, "pairs, not tokens"
    chance_E = np.exp([3, 2, 1, 0]) / np.exp([3, 2, 1, 0]).sum()
    wanted = 4 * (0.5 * chance_E[0] + 0.5 * chance_E[1])
    np.testing.assert_allclose(info.losses["load_balance"], wanted, rtol=1e-6)  # float32


@pytest.mark.slow
def test_rerouting_drops_less_is_counted_and_is_the_same_on_a_mesh():
    choices = {"transport": "cells", "capacity_factor": 1.0}
    wanted = {
        rounds: moes.run(None, "switch", moes.tokens(), moes.context(), reroute=rounds, **choices)
        for rounds in (0, 7)
    }
    dropped = [int(result[0][1][1].stats.dropped_E.sum()) for result in wanted.values()]
    assert dropped[0] > dropped[1] == 0  # seven other experts, and as many slots as tokens
    moved = wanted[7][0][1][1].stats.gate["rerouted"]
    assert float(moved) == dropped[0]
    on_mesh = moes.run(meshes.LARGE, "switch", moes.tokens(), moes.context(), reroute=7, **choices)
    moes.same(on_mesh, wanted[7])
