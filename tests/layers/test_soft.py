"""Soft MoE in the layer: formulas, degenerate cases, padding, every mesh."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import moejax
from moejax.experts import ffn_one
from tests import meshes
from tests.moes import B, D, E, L, context, make, run, same, tokens

LENGTHS = (6, 5, 4, 3, 2, 1, 0, 6)
VALID = jnp.arange(L) < jnp.asarray(LENGTHS)[:, None]
CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
"""float32 sums of at most 96 products, in another order."""


def by_formula(params, x_BLD, slots):
    """The paper's algorithm 1 on one sequence after the other, without their padding."""
    router, rows = params["router"], []
    mu = router["router_DX"]
    mu = router["scale"] * mu / jnp.sqrt(jnp.sum(mu**2, 0) + 1e-6)
    for x, count in zip(x_BLD, LENGTHS, strict=True):
        own, outs = x[:count], []
        logits = own / jnp.sqrt(jnp.sum(own**2, 1, keepdims=True) + 1e-6) @ mu
        mixed = (jnp.exp(logits) / jnp.exp(logits).sum(0)).T @ own if count else 0 * mu.T
        for e in range(E):
            rows_e = mixed[e * slots : (e + 1) * slots]
            hidden = rows_e @ params["gate_EDF"][e]
            hidden = hidden * jax.nn.sigmoid(hidden) * (rows_e @ params["up_EDF"][e])
            outs.append(hidden @ params["down_EFD"][e])
        y = (jnp.exp(logits) / jnp.exp(logits).sum(1, keepdims=True)) @ jnp.concatenate(outs)
        rows.append(jnp.pad(y, ((0, L - count), (0, 0))))
    return jnp.stack(rows)


@functools.cache
def programs(slots):
    """The layer's output and gradients of all parameters and tokens, and those of the formula."""
    graph, params = nnx.split(make("soft", gate_fields={"slots": slots}))
    pure = nnx.to_pure_dict(params)
    pure["router"]["scale"] = jnp.float32(2.5)

    def ours(params, x):
        layer = nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))
        return layer(x, context(valid_BL=VALID))[0]

    def both(params, x):
        for fn in (ours, lambda p, x: by_formula(p, x, slots)):
            y, pull = jax.vjp(fn, params, x)
            yield y, pull(jnp.cos(3 * y))

    return jax.jit(lambda params, x: list(both(params, x))), pure


@pytest.mark.slow
@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_output_and_every_gradient_equal_the_formula(slots):
    program, params = programs(slots)
    ours, theirs = program(params, tokens())
    jax.tree.map(CLOSE, ours, theirs)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(ours))


def test_padding_may_hold_anything_and_has_no_output_and_no_effect():
    program, params = programs(3)
    (y, grads), _ = program(params, tokens())
    (y_, grads_), _ = program(params, jnp.where(VALID[..., None], tokens(), jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, (y, grads), (y_, grads_))
    assert not y[~VALID].any() and not grads[1][~VALID].any()


@functools.cache
def applied(slots, experts=E, train=True, **choices):
    layer = make("soft", experts=experts, gate_fields={"slots": slots}, **choices)
    layer.router["scale"][...] = jnp.float32(3.0)
    return jax.jit(lambda x, context: layer(x, context, train=train)), layer


def test_every_expert_receives_every_token_and_nothing_is_dropped():
    _, info = applied(3)[0](tokens(), context(valid_BL=VALID))
    stats, count = info.stats, VALID.sum()
    np.testing.assert_array_equal(stats.load_E, np.full(E, count))
    assert stats.tokens == count and not stats.dropped_E.any() and stats.unserved_tokens == 0
    assert stats.dropped_K.shape == (E,) and not stats.dropped_L.any()
    CLOSE(stats.prob_E.sum(), count)
    assert set(stats.gate) == {f"{x}_similarity" for x in ("combine", "dispatch", "router")}
    np.testing.assert_array_equal(info.kept_GTK.reshape(B, L, E), VALID[..., None].repeat(E, -1))
    CLOSE(info.losses["load_balance"], 1.0)  # loads are equal whatever the shares


@pytest.mark.slow
def test_one_slot_of_one_expert_gives_every_token_the_same_output():
    """The output is f of the mean under the dispatch weights."""
    run, layer = applied(1, experts=1)
    y, _ = run(tokens(), context(valid_BL=VALID))
    x = np.asarray(tokens(), np.float64)
    mu = np.asarray(layer.router["router_DX"][...], np.float64)[:, 0]
    one = jax.tree.map(lambda w: w[0], layer.expert_weights())
    for b, count in enumerate(LENGTHS):
        if count:
            own = x[b, :count]
            unit = own / np.sqrt((own**2).sum(1, keepdims=True) + 1e-6)
            weight = np.exp(3.0 * unit @ mu / np.sqrt((mu**2).sum() + 1e-6))
            mean = jnp.asarray(weight / weight.sum() @ own, jnp.float32)
            wanted = ffn_one(one, mean[None], "swiglu")
            CLOSE(y[b, :count], np.broadcast_to(wanted, (count, D)))


def test_identity_experts_keep_tokens_in_their_convex_hull():
    layer = moejax.MoE(D, 2 * D, E, gate=make("soft").gate, activation="relu", rngs=nnx.Rngs(0))
    both = jnp.concatenate([jnp.eye(D), -jnp.eye(D)], axis=1)  # relu(x) - relu(-x) = x
    layer.up_EDF[...] = jnp.broadcast_to(both, (E, D, 2 * D))
    layer.down_EFD[...] = jnp.broadcast_to(both.T, (E, 2 * D, D))
    layer.router["scale"][...] = jnp.float32(20.0)
    y, _ = jax.jit(lambda x: layer(x, context(valid_BL=VALID)))(tokens())
    # A hull is where every direction is at most as far as one of its corners.
    direction = jax.random.normal(jax.random.key(4), (D, 200))
    for b, count in enumerate(LENGTHS):
        if count:
            reach, bound = (np.asarray(a[b, :count] @ direction).max(0) for a in (y, tokens()))
            assert (reach <= bound + 1e-5).all()
        assert (np.abs(y[b, :count]).max() > 0.1) if count else not y[b].any()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(L)))
def test_permuting_tokens_permutes_the_outputs(order):
    run, order = applied(3)[0], np.asarray(order)
    y, _ = run(tokens(), context(valid_BL=VALID))
    moved, _ = run(tokens()[:, order], context(valid_BL=VALID[:, order]))
    CLOSE(moved, np.asarray(y)[:, order])


@pytest.mark.slow
def test_transport_capacity_and_phase_change_nothing():
    wanted, _ = applied(3)[0](tokens(), context())
    for choices in (
        {"transport": "dropless"}, {"train": False}, {"capacity_factor": 0.1, "priority": "gate"},
    ):  # fmt: skip
        np.testing.assert_array_equal(applied(3, **choices)[0](tokens(), context())[0], wanted)


def test_later_steps_run_the_same_program():
    layer, traced = applied(3)[1], []

    @jax.jit
    def once(x, context):
        traced.append(x)
        return layer(x, context)[0]

    for step in range(3):
        once(tokens(step), context(step=jnp.int32(step), valid_BL=VALID.at[0, step].set(False)))
    assert len(traced) == 1


def test_bfloat16_tokens_give_bfloat16_outputs_near_those_of_float32():
    run, _ = applied(3)
    half = tokens().astype(jnp.bfloat16)
    (y, info), (exact, info_) = (run(x, context()) for x in (half, half.astype(jnp.float32)))
    assert y.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, info.router, info_.router)
    # 8 bits, in weights, slots and hidden layer.
    assert np.abs(y.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


FIELDS = (("slots", 2), ("noise_std", 0.3))
QUICK = [(meshes.LARGE, "sequence"), ({"data": 2, "expert": 2}, "2")]
SLOW = [
    pytest.param(shape, group, marks=pytest.mark.slow)
    for shape, group in itertools.product(meshes.ALL, ("sequence", "2"))
    if (shape, group) not in QUICK and (group == "sequence" or math.prod(shape.values()) <= 4)
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "group"), [*QUICK, *SLOW])
def test_a_mesh_changes_nothing(shape, group):
    """Noise, weights, statistics, losses and every gradient, with padding."""
    x, ctx = tokens(), context(valid_BL=VALID)
    known = {"group": group, "gate_fields": FIELDS}
    got, wanted = (run(s, "soft", x, ctx, True, **known) for s in (shape, None))
    same(got, wanted)
    jax.tree.map(CLOSE, got[0][1][1].stats.gate, wanted[0][1][1].stats.gate)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got[1]))


@pytest.mark.slow
def test_groups_that_do_not_divide_over_the_mesh_give_the_same_results():
    """Four groups of two sequences on eight shards."""
    known = {"group": "2", "gate_fields": FIELDS}
    x, ctx = tokens(), context(valid_BL=VALID)
    got, wanted = (run(s, "soft", x, ctx, True, **known) for s in (meshes.LARGE, None))
    same(got, wanted)
