"""Rotary positions and attention against the formulas, in numpy and float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers.attention import Attention, attend, implementation_for
from moejax.layers.rope import rotate
from moejax.options import AttentionOptions, RopeOptions
from moejax.types import Context

ROPE = RopeOptions(theta=100.0)


def rope_formula(x, position, theta):
    """Rotation as multiplication of complex numbers: x_i + j x_{i+I/2} times e^(j position f_i)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * position[..., None, None] * theta ** (-2 * np.arange(half) / (2 * half)))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rope_is_a_rotation_by_position_and_frequency():
    rng = np.random.default_rng(0)
    x, position = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 50, (2, 5))
    got = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(position), ROPE)
    # Angles up to 50 radians in float32.
    np.testing.assert_allclose(got, rope_formula(x, position, 100.0), rtol=1e-4, atol=2e-5)


def test_rope_products_depend_on_relative_positions_only():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def product(m, n):
        at = lambda x, p: rotate(x, jnp.full((1, 1), p), ROPE)
        return np.sum(at(query, m) * at(key, n), axis=-1)

    np.testing.assert_allclose(product(3, 1), product(23, 21), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(product(7, 7), np.sum(query * key, axis=-1), rtol=1e-4, atol=2e-5)
    assert np.abs(product(3, 1) - product(4, 1)).max() > 1e-2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_the_softmax_formula(kv_heads):
    width, heads, size = 12, 4, 6
    options = AttentionOptions(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        rope=RopeOptions(theta=100.0),
        implementation="xla",
    )
    layer = Attention(width, options, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 5, width)).astype(np.float32)
    position = np.arange(5) + np.array([[0], [3]])
    weights = [
        np.asarray(w[...], np.float64) for w in (layer.query_DHI, layer.key_DJI, layer.value_DJI)
    ]
    query, key, value = (np.einsum("bld,dhi->blhi", x, w) for w in weights)
    query, key = rope_formula(query, position, 100.0), rope_formula(key, position, 100.0)
    wanted = np.zeros((2, 5, width))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        for t in range(5):
            scores = key[:, : t + 1, shared] @ query[:, t, head, :, None] / math.sqrt(size)
            share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            mixed = (share * value[:, : t + 1, shared]).sum(axis=1)
            wanted[:, t] += mixed @ np.asarray(layer.out_HID[head], np.float64)
    context = Context.of(2, 5, position_BL=jnp.asarray(position))
    got, _ = jax.jit(layer.__call__)(x, context)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # float32 sums of 12 products


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "wanted"),
    [
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "float32", 64, "xla"),
        ("gpu", "bfloat16", 60, "xla"),
        ("gpu", "bfloat16", 136, "xla"),
        ("tpu", "bfloat16", 64, "xla"),
        ("cpu", "bfloat16", 64, "xla"),
    ],
)
def test_auto_selects_the_fused_kernel_where_it_can_run(backend, dtype, size, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert implementation_for("auto", jnp.dtype(dtype), size) == wanted
    assert implementation_for("xla", jnp.dtype(dtype), size) == "xla"


OPTIONS = AttentionOptions(
    num_heads=2, num_kv_heads=1, head_dim=4, rope=RopeOptions(theta=100.0), implementation="xla"
)
LEFT, GAPS, NONE = [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]
HOLES = np.array([LEFT, GAPS, NONE], bool)
SEGMENTS = np.array([[7, 7, 7, 7, 3, 3], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])


def by_segment(layer, x, valid, segment, position):
    """Each segment of each sequence by itself, query by query, in float64."""
    from tests.layers import blocks  # which imports this module

    leaf = lambda p: np.asarray(p[...], np.float64)
    wanted = np.zeros(x.shape)
    for b in range(len(x)):
        for own in np.unique(segment[b]):
            at = np.flatnonzero(segment[b] == own)
            for h in range(leaf(layer.query_DHI).shape[1]):
                query, key, value = (
                    np.asarray(x[b, at], np.float64) @ leaf(w)[:, j]
                    for w, j in ((layer.query_DHI, h), (layer.key_DJI, 0), (layer.value_DJI, 0))
                )
                mixed = blocks.head(
                    query, key, value, position[b, at], valid[b, at], 100.0, layer.options.causal
                )
                wanted[b, at] += mixed @ leaf(layer.out_HID)[h]
    return wanted


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("segment", [None, SEGMENTS], ids=["whole", "segments"])
def test_padding_and_other_segments_are_never_attended_to(causal, segment):
    layer = Attention(8, dataclasses.replace(OPTIONS, causal=causal), rngs=nnx.Rngs(0))
    x = np.random.default_rng(3).normal(size=(3, 6, 8)).astype(np.float32)
    position = 2 * np.arange(6) + np.array([[0], [3], [1]])
    known = (HOLES, np.zeros((3, 6), int) if segment is None else segment, position)
    wanted = by_segment(layer, x, *known)
    context = Context.of(
        3, 6, position_BL=jnp.asarray(position), valid_BL=jnp.asarray(HOLES),
        segment_BL=None if segment is None else jnp.asarray(segment),
    )  # fmt: skip
    run = jax.jit(layer.__call__)
    # Padding may hold anything.
    x[~HOLES] = np.nan
    got = np.asarray(run(x, context)[0])
    np.testing.assert_allclose(got[HOLES], wanted[HOLES], rtol=1e-5, atol=1e-5)
    assert np.isfinite(got).all(), "queries that see nothing included"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_gradients_of_padding_are_zero_and_fully_masked_queries_have_finite_ones(causal):
    layer = Attention(8, dataclasses.replace(OPTIONS, causal=causal), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 6, 8)).at[~HOLES].set(jnp.inf)
    graph, params = nnx.split(layer)

    def loss(params, x):
        context = Context.of(3, 6, position_BL=jnp.zeros((3, 6), jnp.int32), valid_BL=HOLES)
        y, _ = nnx.merge(graph, params)(x, context)
        return jnp.sum(y**2)

    of_params, of_x = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((of_params, of_x)))
    assert (np.asarray(of_x)[~HOLES] == 0).all() and (np.asarray(of_x)[HOLES] != 0).any()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "anywhere"])
def test_the_fused_kernel_gets_a_supported_mask_or_none_if_nothing_is_hidden(
    causal, behind, monkeypatch
):
    """Traced as for a GPU, where cuDNN checks the shapes of its operands."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(f"{cudnn}.is_cuda_compute_capability_equal", lambda *_: False)
    query, key = (jax.ShapeDtypeStruct((2, 64, n, 16), jnp.bfloat16) for n in (4, 2))

    options = AttentionOptions(implementation="cudnn", causal=causal)

    def loss(query, key, valid):
        context = Context.of(2, 64, valid_BL=valid, padded_behind=behind)
        mixed = attend(query, key, key, options, context)
        return jnp.sum(mixed.astype(jnp.float32))

    valid = jax.ShapeDtypeStruct((2, 64), bool)
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(query, key, valid)
    (fused,) = (e for e in jaxpr.eqns if "attention_fwd" in e.primitive.name)
    biases = [v.aval.shape for v in fused.invars if getattr(v.aval, "shape", ()) == (2, 1, 64, 64)]
    assert len(biases) == (0 if causal and behind else 1)
