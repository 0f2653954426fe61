"""Task- and sentence-level gates: one choice per sequence, segment or past."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.gating import Sentence
from tests import gates
from tests.gates import TASKS, D, E, G, T


def padded():
    """Valid lengths of four sequences, one of them empty."""
    return jnp.arange(T)[None] < jnp.asarray([T, T - 3, 5, 0])[:, None]


def by_hand(logits_E, k, renormalize=True):
    """Top-k of one token in numpy: expert -> weight."""
    exponent = np.exp(logits_E - logits_E.max())
    best = np.argsort(-logits_E, kind="stable")[:k]
    total = exponent[best].sum() if renormalize else exponent.sum()
    return {int(e): exponent[e] / total for e in best}


def same(routing, group, token, wanted):
    found = dict(
        zip(
            routing.expert_GTK[group, token].tolist(),
            routing.weight_GTK[group, token].tolist(),
            strict=True,
        )
    )
    assert found.keys() == wanted.keys()
    # float32 logits, exponentials and quotients.
    for expert, weight in wanted.items():
        assert abs(found[expert] - weight) < 1e-5


@pytest.mark.parametrize(("k", "renormalize"), [(2, True), (1, False)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_task_has_one_choice_of_experts_for_all_tokens_of_its_sequences(k, renormalize, rows):
    gate = gating.make("task", k=k, renormalize=renormalize)
    params, given = gates.drawn(gate), gates.context(False, rows=rows)
    x = gates.tokens().reshape(G // rows, rows * T, D)
    routing = gate(params, (), x, given).routing
    logits_ME = np.asarray(params["task_MD"]) @ np.asarray(params["router_DE"])
    tasks = np.asarray(given.task_GR).ravel()
    assert len(set(tasks.tolist())) > 1
    for row, task in enumerate(tasks):
        wanted = by_hand(logits_ME[task], k, renormalize)
        for token in range(T):
            same(routing, row // rows, row % rows * T + token, wanted)


def test_the_embedding_of_a_task_learns_from_its_own_sequences_only():
    gate = gating.make("task")
    params = gates.drawn(gate, scale=0.3)
    given = gates.context(True, task_B=jnp.asarray([0, 2, 0, 2]))

    def pull(params):
        routing = gate(params, (), gates.tokens(), given).routing
        reading = jax.random.normal(jax.random.key(1), (E,))
        return jnp.sum(reading[routing.expert_GTK] * routing.weight_GTK)

    grad_MD = jax.grad(pull)(params)["task_MD"]
    np.testing.assert_array_equal(jnp.abs(grad_MD).max(1) > 0, [True, False, True])
    assert TASKS == 3


def pooled(gate, x_TD, valid_T, first_D=None):
    """What each token of one sequence is routed by, in a Python loop over tokens."""
    out = []
    for t in range(len(x_TD)):
        last = {"mean": T, "running": t + 1, "previous": t // gate.segment * gate.segment}
        end = last[gate.pool]
        begin = max(end - gate.segment, 0) if gate.pool == "previous" else 0
        taken = x_TD[begin:end][valid_T[begin:end]]
        if len(taken):
            out.append(taken.mean(0))
        else:
            out.append(np.zeros(D) if first_D is None else first_D)
    return out


FIELDS = [
    {"pool": "mean"},
    {"pool": "running"},
    {"pool": "previous", "segment": 4},
    {"pool": "previous", "segment": 5},  # the last segment is short
    {"pool": "previous", "segment": 40},  # the first segment is all there is
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_are_routed_by_the_mean_of_their_sequence_segment_or_past(fields, rows):
    gate = Sentence(**fields)
    params, valid = gates.drawn(gate), padded()
    given = gates.context(False, rows=rows, valid_BL=valid)
    x = jnp.where(valid[..., None], gates.tokens(), 0)
    routing = gate(params, (), x.reshape(G // rows, rows * T, D), given).routing
    first = np.asarray(params["first_D"]) if gate.pool == "previous" else None
    for b in range(G):
        means = pooled(gate, np.asarray(x[b]), np.asarray(valid[b]), first)
        for t in range(T):
            group, token = b // rows, b % rows * T + t
            if not valid[b, t]:
                assert (routing.weight_GTK[group, token] == 0).all()
                continue
            same(routing, group, token, by_hand(means[t] @ np.asarray(params["router_DE"]), 2))


def test_a_segment_behind_padding_starts_anew():
    gate = Sentence(pool="previous", segment=4)
    params, valid = gates.drawn(gate), jnp.broadcast_to(jnp.arange(T) >= 8, (G, T))
    given = gates.context(False, valid_BL=valid)
    routing = gate(params, (), jnp.where(valid[..., None], gates.tokens(), 0), given).routing
    wanted = by_hand(np.asarray(params["first_D"]) @ np.asarray(params["router_DE"]), 2)
    for token in range(8, 12):
        same(routing, 0, token, wanted)


@pytest.mark.parametrize("pool", ["mean", "running"])
def test_a_constant_sequence_is_routed_as_switch_routes_its_token(pool):
    gate = Sentence(pool=pool, k=1, renormalize=False)
    switch = gating.make("switch")
    params = gates.drawn(gate)
    x = jnp.broadcast_to(gates.tokens()[:, :1], (G, T, D))
    given = gates.context(False)
    ours, theirs = gate(params, (), x, given), switch(params, (), x, given)
    np.testing.assert_array_equal(ours.routing.expert_GTK, theirs.routing.expert_GTK)
    # A mean of equal numbers may be off by an ulp or two.
    np.testing.assert_allclose(
        ours.routing.weight_GTK, theirs.routing.weight_GTK, rtol=1e-5, atol=1e-6
    )
    assert len(set(ours.routing.expert_GTK[:, 0, 0].tolist())) > 1


def test_the_mean_does_not_know_the_order_of_tokens():
    gate = Sentence()
    params, given = gates.drawn(gate), gates.context(False)
    routing = gate(params, (), gates.tokens(), given).routing
    order = np.random.default_rng(0).permutation(T)
    other = gate(params, (), gates.tokens()[:, order], given).routing
    np.testing.assert_array_equal(routing.expert_GTK, other.expert_GTK)
    assert (routing.expert_GTK == routing.expert_GTK[:, :1]).all()
    running = dataclasses.replace(gate, pool="running")
    changed = running(params, (), gates.tokens()[:, order], given).routing
    assert (
        changed.expert_GTK != running(params, (), gates.tokens(), given).routing.expert_GTK
    ).any()


@pytest.mark.parametrize("name", ["task", "sentence"])
def test_a_constant_weight_and_a_field_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match="gate.renormalize=False"):
        gating.make(name, k=1).check(E, train=True)
    with pytest.raises(ValueError, match="gate.k=9"):
        gating.make(name, k=9).check(E, train=False)


def test_unknown_pools_and_empty_segments_are_refused():
    with pytest.raises(ValueError, match="gate.pool='max' is unknown; use one of mean"):
        Sentence(pool="max").check(E, train=False)
    with pytest.raises(ValueError, match="gate.segment=0"):
        Sentence(segment=0).check(E, train=False)
