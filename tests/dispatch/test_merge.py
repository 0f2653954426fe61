"""Merged experts: against loops and vmap, on every mesh, in bounded memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moejax.dispatch import merge as merge_module
from moejax.dispatch.api import mix
from moejax.experts import ffn_one
from moejax.mesh import make_mesh
from moejax.models.stack import REMAT
from moejax.train.cost.memory import residual_bytes
from moejax.types import ExpertWeights, Merge
from tests import meshes
from tests.hlo import collectives

B, L, SPAN, D, F, E = 8, 10, 4, 6, 10, 8
N = 3  # the last span has two tokens


def case(gated=True, seed=0, spans=N, experts=E):
    """Tokens, weights of every span, experts."""
    keys = jax.random.split(jax.random.key(seed), 5)
    up, gate = (0.5 * jax.random.normal(key, (experts, D, F)) for key in keys[:2])
    down = 0.5 * jax.random.normal(keys[2], (experts, F, D))
    weight_BNE = jax.nn.softmax(2 * jax.random.normal(keys[3], (B, spans, experts)))
    weights = ExpertWeights(gate if gated else None, up, down)
    return jax.random.normal(keys[4], (B, L, D)), weight_BNE, weights


@functools.cache
def program(activation, mesh_name="none", span=SPAN):
    """Output, and the gradients of tokens, merging weights and experts."""
    del mesh_name

    def objective(x, weight, weights):
        y = mix(x, Merge(weight, span), weights, activation)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))


def by_vmap(x_BLD, weight_BNE, weights, activation, span=SPAN):
    """All merged FFNs at once, a copy for every token."""
    weight_BLE = jnp.repeat(weight_BNE, span, axis=1)[:, : x_BLD.shape[1]]

    def token(x_D, weight_E):
        merged = jax.tree.map(lambda w: jnp.einsum("e,eij->ij", weight_E, w), weights)
        return ffn_one(merged, x_D[None], activation)[0]

    return jax.vmap(jax.vmap(token))(x_BLD, weight_BLE)


# float32 sums of E weights, and products of them, in another order.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_output_and_gradients_equal_those_of_per_token_merged_weights(activation):
    args = case(activation == "swiglu")
    (_, y), grads = program(activation)(*args)

    def objective(x, weight, weights):
        return jnp.sum(jnp.sin(by_vmap(x, weight, weights, activation)))

    close(y, by_vmap(*args, activation))
    wanted = jax.jit(jax.grad(objective, (0, 1, 2)))(*args)
    jax.tree.map(close, grads, wanted)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(wanted))


def test_merging_equals_a_loop_in_numpy():
    x, weight, weights = case(gated=False)
    (_, y), _ = program("gelu")(x, weight, weights)
    up_EDF, down_EFD = np.asarray(weights.up_EDF), np.asarray(weights.down_EFD)
    for b in range(B):
        for t in range(L):
            up = sum(w * m for w, m in zip(np.asarray(weight)[b, t // SPAN], up_EDF, strict=True))
            down = sum(w * m for w, m in zip(weight[b, t // SPAN], down_EFD, strict=True))
            h = np.asarray(x)[b, t] @ up
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            close(y[b, t], h @ down)


def expert(weights, e):
    return jax.tree.map(lambda w: w[e], weights)


def mixed_outputs(x, weight, weights, activation):
    """The result of sending a token to all experts: a mean of outputs."""
    weight_BLE = jnp.repeat(weight, SPAN, axis=1)[:, :L]
    x_XD = x.reshape(-1, D)
    outputs = [ffn_one(expert(weights, e), x_XD, activation) for e in range(E)]
    return jnp.einsum("ble,ebld->bld", weight_BLE, jnp.stack(outputs).reshape(E, B, L, D))


@pytest.mark.parametrize("shared", ["up", "down"])
def test_merging_equals_mixing_outputs_for_experts_linear_in_their_differences(shared):
    """Equal first matrices: linear in the second. Equal second ones: linear where relu is."""
    x, weight, weights = case(gated=False)
    same = lambda w: jnp.broadcast_to(w[:1], w.shape)
    if shared == "up":
        weights = weights._replace(up_EDF=same(weights.up_EDF))
    else:
        x, up = jnp.abs(x), jnp.abs(weights.up_EDF)  # nothing is cut
        weights = weights._replace(up_EDF=up, down_EFD=same(weights.down_EFD))
    (_, y), _ = program("relu")(x, weight, weights)
    close(y, mixed_outputs(x, weight, weights, "relu"), rtol=1e-4, atol=1e-4)
    _, _, other = case(gated=False)
    (_, y), _ = program("relu")(x, weight, other)
    gap = np.abs(y - mixed_outputs(x, weight, other, "relu")).max()
    assert gap > 0.1, "of experts in general it is not"


def test_full_weight_on_one_expert_gives_that_expert():
    x, _, weights = case()
    chosen_BN = np.random.default_rng(0).integers(0, E, (B, N))
    (_, y), _ = program("swiglu")(x, jax.nn.one_hot(chosen_BN, E), weights)
    for b in range(B):
        for t in range(L):
            one = expert(weights, chosen_BN[b, t // SPAN])
            close(y[b, t], ffn_one(one, x[b, t][None], "swiglu")[0])


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, *(pytest.param(c, marks=pytest.mark.slow) for c in (3, 8))])
def test_the_number_of_spans_merged_at_once_changes_nothing(at_once, monkeypatch):
    """24 spans; three and eight divide them."""
    args = case()
    wanted = program("swiglu")(*args)
    monkeypatch.setattr(merge_module, "SPANS_AT_ONCE", at_once)
    jax.clear_caches()  # mix is jitted
    program.cache_clear()
    got = program("swiglu")(*args)
    jax.tree.map(close, got, wanted)
    jax.clear_caches()
    program.cache_clear()


QUICK = [{"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(s, id=meshes.name(s), marks=() if s in QUICK else pytest.mark.slow)
        for s in meshes.ALL
    ],
)
def test_a_mesh_changes_neither_output_nor_gradients(shape):
    args = case()
    wanted = program("swiglu")(*args)
    with meshes.entered(shape):
        got = program("swiglu", meshes.name(shape))(*args)
    jax.tree.map(close, got, wanted)


def test_merging_is_in_float32_when_tokens_are_bfloat16():
    x, weight, weights = case()
    y = mix(x.astype(jnp.bfloat16), Merge(weight, SPAN), weights, "swiglu")
    assert y.dtype == jnp.bfloat16
    exact = by_vmap(x.astype(jnp.bfloat16).astype(jnp.float32), weight, weights, "swiglu")
    error = np.abs(np.asarray(y, np.float32) - exact).max()
    # Rounded to 8 bits: the merged matrices, and three products in a row.
    assert 0 < error < 0.03 * np.abs(exact).max()


def test_sequences_that_do_not_divide_over_the_mesh_give_the_same_results():
    x, weight, weights = case()
    wanted = mix(x[:6], Merge(weight[:6], SPAN), weights, "swiglu")
    with meshes.entered({"data": 2, "expert": 4}):
        got = jax.jit(lambda x: mix(x, Merge(weight[:6], SPAN), weights, "swiglu"))(x[:6])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def compiled(shape, backward):
    """Collectives in the text of the compiled program."""
    mesh = make_mesh(shape)
    args = case()
    with jax.set_mesh(mesh):
        run = lambda x, p, w: mix(x, Merge(p, SPAN), w, "swiglu")
        total = lambda *args: jnp.sum(jnp.sin(run(*args)))
        step = jax.jit(jax.grad(total, (0, 1, 2)) if backward else run)
        place = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        P = jax.sharding.PartitionSpec
        x, p = (place(a, P(("data", "fsdp", "expert"))) for a in args[:2])
        wide, narrow = P("expert", None, "tensor"), P("expert", "tensor", None)
        w = ExpertWeights(*map(place, args[2], (wide, wide, narrow)))
        return collectives(step.lower(x, p, w).compile().as_text(), mesh)


def test_merged_weights_are_reduce_scattered_over_expert_and_tokens_stay():
    """In the loop one per matrix; before it the spans' weights, [S, M, E]."""
    found = compiled({"data": 2, "expert": 4}, backward=False)
    assert {(c.kind, *c.axes) for c in found} == {
        ("all-gather", "expert"),
        ("reduce-scatter", "expert"),
    }
    spans, at_once = B * N // 8, 3
    (gathered,) = [c for c in found if c.kind == "all-gather"]
    assert gathered.sizes == (4 * spans * E,)
    scattered = [s for c in found if c.kind == "reduce-scatter" for s in c.sizes]
    assert scattered == [at_once * D * F] * 3


def sums(jaxpr, in_loop=False):
    """(axes, whether it is in a loop) of every sum over devices in a traced program."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name.startswith("psum") or name == "reduce_scatter":
            yield tuple(eqn.params.get("axes", eqn.params.get("axis_name"))), in_loop
        for body in jaxprs_in_params(eqn.params):
            yield from sums(body, in_loop or name == "scan")


def test_gradients_are_summed_over_data_and_tensor_once_and_not_for_every_span():
    shape = {"data": 2, "expert": 2, "tensor": 2}
    total = lambda x, p, w: jnp.sum(jnp.sin(mix(x, Merge(p, SPAN), w, "swiglu")))
    with meshes.entered(shape):
        found = list(sums(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*case()).jaxpr))
    assert {axes for axes, in_loop in found if in_loop} == {("expert",)}
    once = [axis for axes, in_loop in found if not in_loop for axis in axes]
    assert once.count("data") == 3, "one per matrix"
    assert once.count("tensor") == 3, "outputs, gradients of tokens, and of the spans' weights"
    summed = [c for c in compiled(shape, backward=True) if "data" in c.axes]
    assert sorted(s for c in summed for s in c.sizes) == [E // 2 * D * F // 2] * 3


BIG_D, BIG_F = 32, 64
MERGED_BYTES = 3 * BIG_D * BIG_F * 4


def memory(span, remat=None, oracle=False):
    """Bytes alive in the compiled gradient, and kept for the backward pass, of equal tokens."""
    sequences, length = 4, 32
    spans = length // span

    def describe(*dims) -> Any:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    weights = ExpertWeights(
        describe(E, BIG_D, BIG_F), describe(E, BIG_D, BIG_F), describe(E, BIG_F, BIG_D)
    )
    x, p = describe(sequences, length, BIG_D), describe(sequences, spans, E)

    def layer(x, p, w):
        if oracle:
            return by_vmap(x, p, w, "swiglu", span)
        return mix(x, Merge(p, span), w, "swiglu")

    if remat:
        layer = jax.checkpoint(layer, policy=REMAT[remat])
    total = lambda x, p, w: jnp.sum(jnp.sin(layer(x, p, w)))
    program = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, p, weights).compile()
    alive: Any = program.memory_analysis()
    return alive.temp_size_in_bytes, residual_bytes(total, x, p, weights)


@pytest.mark.parametrize("remat", [None, "experts", pytest.param("dots", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_spans(remat):
    """16 spans or 64, of the same 128 tokens: less than one merged FFN more for 48 more spans."""
    few, many = memory(8, remat), memory(2, remat)
    for bytes_few, bytes_many in zip(few, many, strict=True):
        assert bytes_many - bytes_few < MERGED_BYTES


def test_the_memory_measurement_detects_merged_weights_that_are_all_alive():
    alive, kept = memory(2, oracle=True)
    assert min(alive, kept) > 64 * MERGED_BYTES
