"""Every transport on every mesh against the dense oracle: outputs, gradients, drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import reference
from moejax.dispatch import TRANSPORTS, AllExperts, Cells, Dropless, Gather, exchange
from moejax.dispatch.api import dispatch
from moejax.types import ExpertWeights
from tests import meshes
from tests.claims import Claims

GROUPS, TOKENS, WIDTH, HIDDEN, EXPERTS = 8, 6, 5, 6, 8


def weights(activation):
    keys = jax.random.split(jax.random.key(7), 3)
    wide, narrow = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    gate, up = (jax.random.normal(k, wide) * 0.4 for k in keys[:2])
    down = jax.random.normal(keys[2], narrow) * 0.4
    return ExpertWeights(gate if activation == "swiglu" else None, up, down)


def loss(x, routing, w, run):
    """Linear in the output: a curved one would amplify its rounding errors in the gradients."""
    y, kept = run(x, routing, w)
    return jnp.sum(jax.random.normal(jax.random.key(2), y.shape) * y), (y, kept)


@functools.cache
def compiled(mesh_name, transport, activation, capacity):
    """One program per mesh and transport; routings are its inputs."""
    del (
        mesh_name
    )  # part of the cache key: a jitted function belongs to the mesh it was traced under

    def run(x, routing, w):
        return dispatch(
            x,
            routing,
            routing.weight_GTK.max(-1),
            w,
            transport=transport,
            activation=activation,
            capacity=capacity,
        )

    def step(x, routing, w):
        def of(x, weight_GTK, w):
            chosen = routing.__class__(routing.expert_GTK, weight_GTK)
            return loss(x, chosen, w, run)

        return jax.value_and_grad(of, (0, 1, 2), has_aux=True)(x, routing.weight_GTK, w)

    return jax.jit(step)


@functools.cache
def oracle(activation):
    def step(x, routing, w, kept):
        def of(x, weight_GTK, w):
            chosen = routing.__class__(routing.expert_GTK, weight_GTK)
            return loss(
                x, chosen, w, lambda x, r, w: (reference.moe(x, r, w, activation, kept), kept)
            )

        return jax.value_and_grad(of, (0, 1, 2), has_aux=True)(x, routing.weight_GTK, w)

    return jax.jit(step)


def check(shape, transport, routing, activation="swiglu", capacity=2):
    x = jax.random.normal(jax.random.key(1), (GROUPS, TOKENS, WIDTH))
    w = weights(activation)
    with meshes.entered(shape):
        step = compiled(meshes.name(shape), transport, activation, capacity)
        (value, (y, kept)), grads = jax.device_get(step(x, routing, w))
    active = np.asarray(routing.weight_GTK) > 0
    if transport.slot_rules is not None:
        alone = compiled("none", transport, activation, capacity)
        np.testing.assert_array_equal(kept, alone(x, routing, w)[0][1][1])
    else:
        np.testing.assert_array_equal(kept, active)
    (wanted, (wanted_y, _)), wanted_grads = oracle(activation)(x, routing, w, jnp.asarray(kept))
    # float32 sums of at most 48 rows in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(value, wanted)
    close(y, wanted_y)
    jax.tree.map(close, grads, wanted_grads)
    return kept, active


ROUTINGS = {kind: meshes.routing(kind, GROUPS, TOKENS, 3, EXPERTS) for kind in meshes.KINDS}
ROUTINGS["inactive columns and padding"] = meshes.inactive(ROUTINGS["zipf"])
QUICK = [meshes.SMALL, meshes.LARGE]


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize(
    "shape",
    [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in meshes.ALL if s not in QUICK)],
    ids=meshes.name,
)
def test_every_transport_equals_the_oracle_for_every_load(shape, name):
    """All pairs of mesh and transport: each pair sends in its own way. Loads share a program."""
    claims = Claims(f"{name} on {meshes.name(shape)}")
    for kind, routing in ROUTINGS.items():
        claims.check(equals_the_oracle, shape, TRANSPORTS[name](), kind, routing, name=kind)
    claims.settle()


def equals_the_oracle(shape, transport, kind, routing):
    kept, active = check(shape, transport, routing)
    assert kept.sum() > 0
    assert (active.sum() < active.size) == kind.startswith("inactive")
    if transport.slot_rules is not None and kind != "balanced":
        assert kept.sum() < active.sum(), "capacity 2 must drop something here"


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("name", "activation"),
    [(t, ("gelu", "relu")[i % 2]) for i, t in enumerate(TRANSPORTS)]
    + [
        pytest.param(t, ("relu", "gelu")[i % 2], marks=pytest.mark.slow)
        for i, t in enumerate(TRANSPORTS)
    ],
)
def test_every_transport_equals_the_oracle_for_experts_without_a_gate_branch(name, activation):
    shape = {"data": 2, "expert": 2, "tensor": 2}
    check(shape, TRANSPORTS[name](), meshes.routing("zipf", GROUPS, TOKENS, 2, EXPERTS), activation)


@pytest.mark.quick(1)
@pytest.mark.parametrize("priority", ["choice", "gate", "random"])
def test_the_dropped_set_of_every_priority_is_the_same_on_a_mesh(priority):
    routing = meshes.routing("zipf", GROUPS, TOKENS, 2, EXPERTS)
    kept, active = check(meshes.LARGE, Cells(priority=priority), routing, capacity=1)
    assert 0 < kept.sum() < active.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "routing_content"),
    [
        ("dropless", np.nan),
        pytest.param("dropless_once", np.nan, marks=pytest.mark.slow),
        pytest.param("dropless_once", 1.0, marks=pytest.mark.slow),
    ],
)
def test_unwritten_buffer_rows_are_never_read(name, routing_content, monkeypatch):
    """Receive buffers start as NaN here; on TPU and GPU they hold arbitrary contents,
    which may read as expert 1 with weight 1 in a buffer of experts and weights."""
    real, filled = exchange.buffer_like, []

    def poisoned(rows_ND, capacity):
        filled.append(capacity)
        content = np.nan if rows_ND.shape[1] == WIDTH else routing_content
        return jnp.full_like(real(rows_ND, capacity), content)

    monkeypatch.setattr(exchange, "buffer_like", poisoned)
    forget_programs()  # those that were traced without the poison
    routing = meshes.inactive(meshes.routing("half_empty", GROUPS, TOKENS, 2, EXPERTS))
    transport = TRANSPORTS[name]()
    check({"data": 2, "expert": 2}, transport, routing)
    check({"expert": 8}, transport, meshes.routing("all_to_one", GROUPS, TOKENS, 2, EXPERTS))
    assert filled
    forget_programs()


def forget_programs():
    compiled.cache_clear()
    jax.clear_caches()


def test_more_than_one_device_receives_tokens():
    """Every expert shard has rows under a balanced routing, so the meshes above are exercised."""
    routing = meshes.routing("balanced", GROUPS, TOKENS, 2, EXPERTS)
    owner = np.asarray(routing.expert_GTK) // (EXPERTS // 4)
    assert set(owner.ravel()) == {0, 1, 2, 3}


def test_identical_experts_equal_one_ffn():
    one = jax.tree.map(lambda w: w[:1], weights("swiglu"))
    same = jax.tree.map(lambda w: jnp.repeat(w, EXPERTS, axis=0), one)
    routing = meshes.routing("zipf", GROUPS, TOKENS, 2, EXPERTS)
    unit = routing.weight_GTK / routing.weight_GTK.sum(-1, keepdims=True)
    x = jax.random.normal(jax.random.key(1), (GROUPS, TOKENS, WIDTH))
    from moejax.experts import ffn_one

    wanted = ffn_one(jax.tree.map(lambda w: w[0], one), x.reshape(-1, WIDTH), "swiglu")
    for transport in (Dropless(), Gather(), AllExperts()):
        with meshes.entered(meshes.LARGE):
            y, _ = jax.jit(functools.partial(dispatch, transport=transport, activation="swiglu"))(
                x, routing.__class__(routing.expert_GTK, unit), unit[..., 0], same
            )
        np.testing.assert_allclose(y.reshape(-1, WIDTH), wanted, rtol=1e-5, atol=1e-5)


def test_experts_that_do_not_divide_are_refused_with_both_numbers():
    w = jax.tree.map(lambda a: jnp.zeros((12, *a.shape[1:])), weights("swiglu"))
    routing = meshes.routing("balanced", 8, TOKENS, 2, 8)
    x = jnp.zeros((8, TOKENS, WIDTH))
    message = "num_experts=12 is not a multiple of the 'expert' mesh axis"
    with meshes.entered({"expert": 8}), pytest.raises(ValueError, match=message):
        dispatch(x, routing, x[..., 0], w, transport=Gather(), activation="swiglu")
