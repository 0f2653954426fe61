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
    """A sequence cut short, one with a hole, one that starts late, an empty one."""
    place = jnp.arange(T)
    return jnp.stack([place < T - 3, (place < 6) | (place > 8), place > 4, place < 0])


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


@pytest.mark.quick(1)
@pytest.mark.parametrize(("k", "renormalize"), [(2, True), (1, False)])
@pytest.mark.parametrize("rows", [1, 2])
def test_all_tokens_of_a_task_go_to_the_same_experts(k, renormalize, rows):
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


def pooled(gate, x_ND, first_D):
    """The router's input for each valid token of one text, in a Python loop over them."""
    out = []
    for i in range(len(x_ND)):
        end = {"mean": len(x_ND), "running": i + 1}.get(gate.pool, i // gate.segment * gate.segment)
        begin = max(end - gate.segment, 0) if gate.pool == "previous" else 0
        out.append(x_ND[begin:end].mean(0) if end else first_D)
    return out


FIELDS = [
    {"pool": "mean"},
    {"pool": "running"},
    {"pool": "previous", "segment": 4},
    {"pool": "previous", "segment": 5},  # the last segment is short
    {"pool": "previous", "segment": 40},  # the first segment is all there is
]


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_are_routed_by_the_mean_of_their_text_segment_or_past(fields, rows, packed):
    """Padding before, in and after a sequence is ignored, and so is another text in the row."""
    gate = Sentence(**fields)
    params, valid = gates.drawn(gate), padded()
    text = np.repeat([[7, 2, 9]], G, axis=0).repeat([7, 3, T - 10], axis=1)
    segment = jnp.asarray(text, jnp.int32) if packed else None
    given = gates.context(False, rows=rows, valid_BL=valid, segment_BL=segment)
    x = jnp.where(valid[..., None], gates.tokens(), 0)
    routing = gate(params, (), x.reshape(G // rows, rows * T, D), given).routing
    first = np.asarray(params["first_D"]) if gate.pool == "previous" else None
    for b, one in np.ndindex(G, 3 if packed else 1):
        own = np.flatnonzero(np.asarray(valid[b]) & ((text[b] == [7, 2, 9][one]) | (not packed)))
        for t, mean in zip(own, pooled(gate, np.asarray(x[b])[own], first), strict=True):
            wanted = by_hand(mean @ np.asarray(params["router_DE"]), 2)
            same(routing, b // rows, b % rows * T + t, wanted)
    of_padding = routing.weight_GTK.reshape(G, T, -1)[~np.asarray(valid)]
    assert of_padding.size and (of_padding == 0).all()


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


def test_the_mean_does_not_depend_on_the_order_of_tokens():
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
