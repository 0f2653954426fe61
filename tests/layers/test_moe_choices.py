"""A layer under every choice around its gate: padding, groups, scopes, precision."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating, reference
from moejax.dispatch import TRANSPORTS
from moejax.gating.ops import row_noise
from moejax.layers.moe import priority_score
from moejax.types import EvalStats
from tests import meshes
from tests.layers.test_moe import B, D, E, L, context, make, run, same, tokens

VALID = jnp.arange(L) < jnp.asarray([6, 5, 4, 3, 2, 1, 0, 6])[:, None]


@functools.cache
def padded(gate, transport):
    """Jitted value, output, losses, statistics and gradients of a layer on padded sequences."""
    graph, params = nnx.split(make(gate, transport=transport, num_shared=1))

    def objective(params, x):
        y, info = nnx.merge(graph, params)(x, context(valid_BL=VALID))
        total = jnp.sum(jnp.where(VALID[..., None], jnp.sin(y), 0.0)) + sum(info.losses.values())
        return total, (y, info.losses, info.stats)

    return jax.jit(jax.value_and_grad(objective, has_aux=True)), params


QUICK = [("cells", "shazeer"), ("all_experts", "mixtral")]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("transport", "gate"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(TRANSPORTS, ["mixtral", "shazeer"])
    ],
)
def test_padding_may_hold_nan(transport, gate):
    """Fully masked attention outputs NaN, and 0 times NaN is NaN, also in the backward pass."""
    step, params = padded(gate, transport)
    x = jnp.where(VALID[..., None], tokens(), 0.0)
    got, wanted = step(params, jnp.where(VALID[..., None], x, jnp.nan)), step(params, x)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(wanted))
    assert wanted[0][1][2].tokens == VALID.sum() < B * L


CHOICES = [
    ({"data": 2}, {"group": "4", "balance_scope": "group"}),
    ({"data": 2, "expert": 2}, {"group": "2", "balance_scope": "batch"}),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, {"group": "2", "balance_scope": "group"}),
    (meshes.LARGE, {"group": "4", "balance_scope": "group", "transport": "dropless"}),
    (meshes.LARGE, {"group": "batch", "balance_scope": "batch", "transport": "gather"}),
]


@pytest.mark.slow
@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        pytest.param(*case, marks=() if i in (1, 4) else pytest.mark.slow)
        for i, case in enumerate(CHOICES)
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_groups_and_scopes_refer_to_the_global_batch_on_every_mesh(shape, choices):
    """A group may lie on several devices, and a device may hold several groups."""
    if "transport" not in choices:
        choices = {**choices, "capacity_factor": 1.0}
    x, ctx = tokens(), context(valid_BL=VALID)
    got, wanted = (run(where, "shazeer", x, ctx, **choices) for where in (shape, None))
    same(got, wanted)
    if "transport" not in choices:
        assert wanted[0][1][1].stats.dropped_E.sum() > 0


def by_hand(info, probs, rows):
    """The load-balancing loss of scopes of ``rows`` sequences, by loops over what was routed."""
    expert = np.asarray(info.routing.expert_GTK).reshape(B, L, -1)
    active = np.asarray(info.routing.weight_GTK).reshape(expert.shape) > 0
    total = 0.0
    for first in range(0, B, rows):
        scope = slice(first, first + rows)
        tokens_here = int(VALID[scope].sum())
        if tokens_here:
            load = np.bincount(expert[scope][active[scope]], minlength=E)
            mean = probs[scope][np.asarray(VALID[scope])].mean(0)
            total += tokens_here * E * (load / load.sum() * mean).sum()
    return total / int(VALID.sum())


@pytest.mark.quick(2)
@pytest.mark.parametrize(("scope", "rows"), [("sequence", 1), ("group", 2), ("batch", B)])
def test_the_balance_loss_counts_the_pairs_that_were_routed(scope, rows):
    """Not the plain top-k: GShard skips second experts at random, and padding visits no expert."""
    layer = make("gshard", gate_fields={"threshold": 1.0}, group="2", balance_scope=scope)
    _, info = layer(tokens(), context(valid_BL=VALID))
    probs = np.asarray(jax.nn.softmax(tokens() @ layer.router["router_DE"][...]))
    skipped = 2 * int(VALID.sum()) - int(info.stats.load_E.sum())
    assert skipped > 5
    # float32 sums of at most 48 probabilities.
    np.testing.assert_allclose(info.losses["load_balance"], by_hand(info, probs, rows), rtol=1e-5)


def linear(y):
    """An objective that adds no error of its own to gradients, as a curved one would."""
    return jnp.sum(jax.random.normal(jax.random.key(2), y.shape) * y.astype(jnp.float32))


@functools.cache
def half(transport, mesh_name):
    del mesh_name
    graph, params = nnx.split(make(transport=transport, capacity_factor=1.0))

    def objective(params, x):
        y, info = nnx.merge(graph, params)(x, context())
        return linear(y), (y, info.kept_GTK, info.routing)

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True)), graph, params


@pytest.mark.slow
@pytest.mark.parametrize(
    "transport",
    [pytest.param(t, marks=() if t == "dropless" else pytest.mark.slow) for t in TRANSPORTS],
)
def test_a_bfloat16_layer_equals_the_float32_layer_within_its_precision_on_a_mesh(transport):
    x = tokens().astype(jnp.bfloat16)
    with meshes.entered(meshes.LARGE):
        step, graph, params = half(transport, meshes.name(meshes.LARGE))
        # On the host: the oracle is not to run on the mesh.
        (_, (y, kept, routing)), (grads, grad_x) = jax.device_get(step(params, x))

    def objective(params, x):
        layer = nnx.merge(graph, params)
        weights = layer.expert_weights()
        own = gating.top_k_routing(x @ layer.router["router_DE"][...], 2, renormalize=True)
        y = reference.moe(x, moejax.Routing(*own), weights, "swiglu", jnp.asarray(kept))
        return linear(y), y

    (_, wanted), (wanted_grads, wanted_x) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        params, x.astype(jnp.float32)
    )
    assert y.dtype == grad_x.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
    assert routing.weight_GTK.dtype == jnp.float32

    def close(got, exact):
        """Products and the sums between them are rounded to 8 bits: 2^-9 each, a few in a row."""
        error = np.abs(np.asarray(got, np.float32) - np.asarray(exact, np.float32))
        assert error.max() < 0.03 * np.abs(exact).max()

    close(y, wanted)
    close(grad_x, wanted_x)
    jax.tree.map(close, grads, wanted_grads)


def test_priority_random_needs_no_key_where_nothing_competes():
    layer = make("mixtral", priority="random", capacity_factor=0.5)
    y, info = layer(tokens(), train=False)  # dropless
    assert info.kept_GTK.all() and jnp.isfinite(y).all()
    with pytest.raises(ValueError, match="pass a context with a PRNG key"):
        layer(tokens())


@pytest.mark.parametrize(("train", "dropped"), [(True, 8), (False, 6)])
def test_training_and_evaluation_have_separate_capacity_factors(train, dropped):
    """A router of zeros sends all six tokens to experts 0 and 1, with slots for two or three."""
    choices = {"capacity_factor": 1.0, "eval_transport": "cells", "eval_capacity_factor": 2.0}
    layer = make("mixtral", **choices)
    layer.router["router_DE"][...] = jnp.zeros((D, E))
    _, info = layer(tokens(), train=train)
    np.testing.assert_array_equal(info.stats.dropped_E, [B * dropped / 2] * 2 + [0] * 6)
    assert isinstance(info.stats, EvalStats) != train


def test_priority_gate_serves_tokens_by_their_largest_weight():
    """Not by the sum of their weights, which would put the first token last."""
    known = moejax.Context.of(1, 2).grouped(1, True)
    weight_GTK = jnp.asarray([[[0.5, 0.0], [0.4, 0.4]]])
    routing = moejax.Routing(jnp.zeros((1, 2, 2), jnp.int32), weight_GTK)
    score_GT = priority_score(routing, known, moejax.types.SlotRules(priority="gate"))
    assert score_GT[0, 0] > score_GT[0, 1]


def test_random_priority_is_independent_of_the_gates_own_draw():
    """GShard keeps second experts where U < 2 g2; the same U as priority would serve them last."""
    known = moejax.Context.of(64, 32, key=jax.random.key(0)).grouped(1, True)
    rules = moejax.types.SlotRules(priority="random")
    routing = moejax.Routing(jnp.zeros((64, 32, 2), jnp.int32), jnp.ones((64, 32, 2)))
    order_GT = priority_score(routing, known, rules)
    drawn_GT = row_noise(jax.random.uniform, known, ())
    correlation = np.corrcoef(np.ravel(order_GT), np.ravel(drawn_GT))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(64 * 32)


class WithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)  # pyright: ignore[reportCallIssue]
    def test_a_layer_gives_the_same_result_eagerly_and_compiled(self):
        layer = make("shazeer", capacity_factor=1.0)
        call: Any = self.variant
        y, info = call(lambda x: layer(x, context()))(tokens())
        wanted, wanted_info = layer(tokens(), context())
        np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)  # fused in another order
        np.testing.assert_array_equal(info.kept_GTK, wanted_info.kept_GTK)
        assert wanted_info.stats.dropped_E.sum() > 0


def test_arrays_of_inconsistent_shapes_are_refused_by_the_layer():
    layer = make()
    with pytest.raises(ValueError, match="shape"):
        layer(jnp.zeros((B, L, D + 1)))
    with pytest.raises(ValueError, match="shape"):
        layer(tokens(), moejax.Context.of(B, L + 1))
