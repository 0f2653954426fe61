"""Tokens mixed into slots and back: numpy loops, every mesh, and the program's traffic."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moejax.dispatch.api import mix, weight_specs
from moejax.mesh import batch_spec, make_mesh
from moejax.types import ExpertWeights, Slots
from tests import hlo, meshes

G, T, D, F, E, P = 8, 5, 6, 4, 8, 2


def problem(slots=P, experts=E, seed=0):
    """Tokens, mixing and weights; groups 1 and 2 have padding, group 3 nothing else."""
    keys = jax.random.split(jax.random.key(seed), 6)
    logits = jax.random.normal(keys[0], (2, G, T, experts * slots))
    valid = (jnp.arange(T) < jnp.asarray([T, 3, 1, 0] + [T] * 4)[:, None])[..., None]
    dispatch = jnp.where(valid, jnp.exp(logits[0]), 0)
    total = dispatch.sum(1, keepdims=True)
    mixing = Slots(dispatch / jnp.where(total > 0, total, 1), valid * jax.nn.softmax(logits[1]))
    shapes = [(experts, D, F), (experts, D, F), (experts, F, D)]
    drawn = (jax.random.normal(k, s) for k, s in zip(keys[1:4], shapes, strict=True))
    weights = ExpertWeights(*drawn)
    return jax.random.normal(keys[5], (G, T, D)), mixing, weights


def by_hand(x_GTD, mixing, weights, slots):
    """Group by group, slot by slot, token by token, in float64; gated by x sigmoid(x)."""
    x, dispatch, combine, gate, up, down = (
        np.asarray(a, np.float64)
        for a in (x_GTD, mixing.dispatch_GTX, mixing.combine_GTX, *weights[:3])
    )
    y = np.zeros_like(x)
    for g in range(len(x)):
        for i in range(dispatch.shape[-1]):
            e = i // slots
            mixed = sum(dispatch[g, t, i] * x[g, t] for t in range(x.shape[1]))
            hidden = mixed @ gate[e]
            hidden = hidden / (1 + np.exp(-hidden)) * (mixed @ up[e])
            for t in range(x.shape[1]):
                y[g, t] += combine[g, t, i] * (hidden @ down[e])
    return y


@cache
def program(mesh_name):
    """Output, and gradients of tokens, both weights and all experts' matrices."""
    del mesh_name

    def run(x, mixing, weights):
        y = mix(x, mixing, weights, "swiglu")
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


CLOSE = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
"""float32 sums of at most 80 products, in another order."""


@pytest.mark.quick(1)
@pytest.mark.parametrize(("slots", "experts"), [(1, E), (P, E), (1, 1), (3, 1)])
def test_outputs_equal_those_of_loops(slots, experts):
    args = problem(slots, experts)
    CLOSE(program(None)(*args)[0][1], by_hand(*args, slots))


def test_outputs_without_a_gated_activation_equal_those_of_loops():
    x, mixing, weights = problem()
    y = mix(x, mixing, weights._replace(gate_EDF=None), "relu")
    wanted = 0
    for i in range(E * P):
        mixed = np.einsum("gtd,gt->gd", x, mixing.dispatch_GTX[..., i])
        out = np.maximum(mixed @ weights.up_EDF[i // P], 0) @ weights.down_EFD[i // P]
        wanted += out[:, None] * np.asarray(mixing.combine_GTX[..., i])[..., None]
    CLOSE(y, wanted)


SHAPES = [
    {"expert": 2}, {"data": 2, "expert": 4}, {"data": 2, "expert": 2, "tensor": 2},
    *(pytest.param(s, marks=pytest.mark.slow) for s in (
        {"data": 1}, {"tensor": 2}, {"fsdp": 4}, {"expert": 8}, {"data": 8},
        {"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2},
    )),
]  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", SHAPES, ids=meshes.name)
def test_a_mesh_changes_neither_outputs_nor_gradients(shape):
    args = problem()
    wanted = program(None)(*args)
    with meshes.entered(shape):
        got = jax.device_get(program(meshes.name(shape))(*args))
    jax.tree.map(CLOSE, got, wanted)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got[1]))


def sent(shape, backward):
    """Collectives of the compiled program, with tokens laid out as the layer has them."""
    x, mixing, weights = problem()
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    with jax.set_mesh(mesh):
        specs = (batch_spec(), batch_spec(), weight_specs(weights))
        args = jax.device_put(
            (x, mixing, weights), jax.tree.map(partial(NamedSharding, mesh), specs)
        )
        if backward:
            lowered = program(("lowered", meshes.name(shape))).lower(*args)
        else:
            lowered = jax.jit(lambda x, m, w: mix(x, m, w, "swiglu")).lower(*args)
        return hlo.collectives(lowered.compile().as_text(), mesh)


def test_slots_go_to_their_experts_and_back_and_nothing_else_is_sent():
    """Forward: two exchanges of a device's slots. Backward: two more, and sums of gradients."""
    found = sent(meshes.LARGE, backward=False)
    assert [(c.kind, set(c.axes)) for c in found] == [("all-to-all", {"expert"})] * 2
    assert all(sum(c.sizes) == (G // 8) * E * P * D for c in found)
    both = sent(meshes.LARGE, backward=True)
    assert sum(c.kind == "all-to-all" for c in both) == 4
    assert {c.kind for c in both} == {"all-to-all", "all-reduce"}
    # Matrices are summed over `data`, the objective over all; no tokens.
    sums = {(dims, *c.axes) for c in both if c.kind == "all-reduce" for dims in c.sizes}
    assert sums <= {(E // 4 * D * F, "data"), (1, "data", "expert"), (1, "expert", "data")}


def test_a_tensor_split_sums_slots_once_each_way():
    """Not the tokens' weights, and not once for each matrix."""
    shape = {"data": 2, "expert": 2, "tensor": 2}
    slots = (G // 4) * E * P * D
    for backward, times in ((False, 1), (True, 2)):
        over = [c for c in sent(shape, backward) if c.axes == {"tensor"}]
        assert [(c.kind, c.sizes) for c in over] == [("all-reduce", (slots,))] * times


def test_bfloat16_tokens_give_bfloat16_close_to_float32():
    args = problem()
    y = mix(args[0].astype(jnp.bfloat16), *args[1:], "swiglu")
    exact = by_hand(*args, P)
    assert y.dtype == jnp.bfloat16
    # 8 bits, in weights, slots, hidden layer and sums of 16 slots.
    assert np.abs(y.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_groups_that_do_not_divide_over_the_mesh_give_the_same_outputs():
    x, mixing, weights = problem()
    odd, odd_mixing = jax.tree.map(lambda a: a[:6], (x, mixing))
    wanted = mix(odd, odd_mixing, weights, "swiglu")
    with meshes.entered({"data": 8}):
        got = mix(odd, odd_mixing, weights, "swiglu")
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_experts_that_do_not_divide_over_the_mesh_are_refused():
    x, mixing, weights = problem()
    with meshes.entered({"expert": 8}), pytest.raises(ValueError, match="num_experts=6 is not"):
        mix(x, mixing, jax.tree.map(lambda w: w[:6], weights), "swiglu")
