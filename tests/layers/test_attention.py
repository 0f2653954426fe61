"""Rotary positions and attention against the formulas, in numpy and float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers.attention import Attention, implementation_for, rope


def rope_formula(x, position, theta):
    """Rotation as multiplication of complex numbers: x_i + j x_{i+I/2} times e^(j position f_i)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * position[..., None, None] * theta ** (-2 * np.arange(half) / (2 * half)))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rope_is_a_rotation_by_position_and_frequency():
    rng = np.random.default_rng(0)
    x, position = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 50, (2, 5))
    got = rope(jnp.asarray(x, jnp.float32), jnp.asarray(position), 100.0)
    # Angles up to 50 radians in float32.
    np.testing.assert_allclose(got, rope_formula(x, position, 100.0), rtol=1e-4, atol=2e-5)


def test_rope_products_depend_on_relative_positions_only():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    def product(m, n):
        at = lambda x, p: rope(x, jnp.full((1, 1), p), 100.0)
        return np.sum(at(query, m) * at(key, n), axis=-1)

    np.testing.assert_allclose(product(3, 1), product(23, 21), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(product(7, 7), np.sum(query * key, axis=-1), rtol=1e-4, atol=2e-5)
    assert np.abs(product(3, 1) - product(4, 1)).max() > 1e-2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_the_softmax_formula(kv_heads):
    width, heads, size = 12, 4, 6
    layer = Attention(
        width, heads, kv_heads, size, theta=100.0, implementation="xla", rngs=nnx.Rngs(0)
    )
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
    got = jax.jit(layer.__call__)(x, jnp.asarray(position))
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
def test_auto_is_the_fused_kernel_where_it_can_run(backend, dtype, size, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert implementation_for("auto", jnp.dtype(dtype), size) == wanted
    assert implementation_for("xla", jnp.dtype(dtype), size) == "xla"
