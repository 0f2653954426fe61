"""Every option of attention against a plain loop in float64, at once and token by token."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers.attention import Attention
from moejax.layers.latent import LatentAttention
from moejax.options import AttentionOptions, LatentOptions, RopeOptions
from moejax.types import Context

B, L, D = 3, 9, 12
BASE = AttentionOptions(num_heads=4, num_kv_heads=2, head_dim=8, implementation="xla")
YARN = RopeOptions(
    theta=50.0, scaling="yarn", factor=4.0, trained_length=64, low_turns=1.0, high_turns=8.0
)
LONG = RopeOptions(
    theta=50.0, scaling="longrope", factor=4.0, trained_length=64, short_factors="1,1.5,2,2.5",
    long_factors="1,3,5,7", long_magnitude=1.3,
)  # fmt: skip
CASES = {
    "plain": {},
    "biases of queries, keys and values": {"bias": "qkv"},
    "biases of all": {"bias": "all"},
    "normalised heads": {"qk_norm": "head"},
    "normalised projections": {"qk_norm": "projection", "qk_norm_eps": 1e-3},
    "unit length": {"qk_norm": "unit", "qk_norm_eps": 1e-3},
    "scale": {"scale": 0.7},
    "capped scores": {"score_cap": 0.8},
    "sinks": {"sinks": True, "window": 4},
    "window": {"window": 3},
    "chunks": {"window": 4, "window_kind": "chunk"},
    "window, both ways": {"window": 3, "causal": False},
    "no rotation": {"rope": RopeOptions(theta=None)},
    "temperature": {
        "rope": RopeOptions(theta=None), "temperature": 0.5, "temperature_length": 3,
    },
    "half rotated": {"rope": RopeOptions(theta=50.0, share=0.5)},
    "neighbours rotated": {"rope": RopeOptions(theta=50.0, interleaved=True)},
    "linear": {"rope": RopeOptions(theta=50.0, scaling="linear", factor=3.0)},
    "llama3": {
        "rope": dataclasses.replace(YARN, scaling="llama3", high_turns=4.0, trained_length=40)
    },
    "yarn": {"rope": YARN},
    "longrope": {"rope": LONG},
    "longrope beyond training": {"rope": dataclasses.replace(LONG, long=True)},
    "yarn, fractional": {"rope": dataclasses.replace(YARN, whole_pairs=False, magnitude=1.3)},
}  # fmt: skip
HOLES = np.ones((B, L), bool)
HOLES[0, :2], HOLES[1, 4] = False, False


def turns(options: RopeOptions, width: int) -> np.ndarray:
    """The frequency of each rotated pair, one at a time, as the papers define it."""
    pairs, found = int(width * options.share) // 2, []
    assert options.theta is not None
    for pair in range(pairs):
        plain = options.theta ** (-pair / pairs)
        stretched, length = plain / options.factor, 2 * math.pi / plain
        if options.scaling == "none":
            found.append(plain)
        elif options.scaling == "longrope":
            text = options.long_factors if options.long else options.short_factors
            found.append(plain / float(text.split(",")[pair]))
        elif options.scaling == "linear":
            found.append(stretched)
        elif options.scaling == "llama3":
            trained = options.trained_length
            if length < trained / options.high_turns:
                found.append(plain)
            elif length > trained / options.low_turns:
                found.append(stretched)
            else:
                low, high = options.low_turns, options.high_turns
                smooth = (trained / length - low) / (high - low)
                found.append((1 - smooth) * stretched + smooth * plain)
        else:
            where = [
                2 * pairs * math.log(options.trained_length / (n * 2 * math.pi))
                / (2 * math.log(options.theta))
                for n in (options.high_turns, options.low_turns)
            ]  # fmt: skip
            if options.whole_pairs:
                where = [math.floor(where[0]), math.ceil(where[1])]
            low, high = max(where[0], 0), min(where[1], 2 * pairs - 1)
            ramp = min(max((pair - low) / (high - low), 0), 1)
            found.append(stretched * ramp + plain * (1 - ramp))
    return np.array(found)


def turned(x: np.ndarray, position: int, options: RopeOptions) -> np.ndarray:
    """One head's vector at a position, pair by pair."""
    y, size = x.copy(), int(len(x) * options.share)
    factor = 1.0
    if options.scaling == "yarn":
        factor = options.magnitude or 0.1 * math.log(options.factor) + 1
    if options.scaling == "longrope":
        factor = 1.3 if options.long else math.sqrt(1 + math.log(4) / math.log(64))
    for pair, frequency in enumerate(turns(options, len(x))):
        i, j = (2 * pair, 2 * pair + 1) if options.interleaved else (pair, pair + size // 2)
        point = (x[i] + 1j * x[j]) * np.exp(1j * position * frequency) * factor
        y[i], y[j] = point.real, point.imag
    return y


def reference(layer: Attention, x: np.ndarray, valid: np.ndarray, position: np.ndarray):
    """One sequence, one query and one head at a time."""
    options = layer.options
    leaf = lambda name: np.asarray(getattr(layer, name)[...], np.float64)
    length, heads, kv_heads = len(x), options.num_heads, options.num_kv_heads
    q, k, v = (np.einsum("ld,dhi->lhi", x, leaf(n)) for n in ("query_DHI", "key_DJI", "value_DJI"))
    if options.bias != "none":
        q, k = q + leaf("query_bias_HI"), k + leaf("key_bias_JI")
        v = v + leaf("value_bias_JI")
    rms = lambda a, axes: a / np.sqrt((a**2).mean(axis=axes, keepdims=True) + options.qk_norm_eps)
    if options.qk_norm in ("head", "projection"):
        axes = (-1,) if options.qk_norm == "head" else (-2, -1)
        weight = [
            np.asarray(n.scale_D[...], np.float64) for n in (layer.query_norm, layer.key_norm)
        ]
        q, k = (
            rms(a, axes) * w.reshape(-1, a.shape[-1]) for a, w in zip((q, k), weight, strict=True)
        )
    if options.rope.theta is not None:
        q, k = (
            np.array([[turned(h, position[t], options.rope) for h in a[t]] for t in range(length)])
            for a in (q, k)
        )
        if options.qk_norm == "unit":
            q, k = rms(q, (-1,)), rms(k, (-1,))
    elif options.temperature:
        grown = np.log1p(np.floor((position + 1) / options.temperature_length))
        q = q * (1 + options.temperature * grown)[:, None, None]
    y = np.zeros((length, x.shape[1]))
    for t in range(length):
        for h in range(heads):
            score, seen = [], []
            for s in range(length):
                far = abs(t - s) >= options.window
                if options.window_kind == "chunk" and options.window:
                    far = position[t] // options.window != position[s] // options.window
                if not valid[s] or (options.causal and s > t) or (options.window and far):
                    continue
                z = q[t, h] @ k[s, h * kv_heads // heads] * (options.scale or q.shape[-1] ** -0.5)
                cap = options.score_cap
                score.append(cap * math.tanh(z / cap) if cap else z)
                seen.append(v[s, h * kv_heads // heads])
            weight = np.exp(score)
            total = weight.sum() + (np.exp(leaf("sink_H")[h]) if options.sinks else 0)
            y[t] += (weight / total) @ np.array(seen).reshape(-1, v.shape[-1]) @ leaf("out_HID")[h]
    return y + (leaf("out_bias_D") if options.bias == "all" else 0)


@functools.cache
def layer_of(name: str) -> Attention:
    """A layer whose biases, norms and sinks all matter."""
    layer = Attention(D, dataclasses.replace(BASE, **CASES[name]), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        if any(part in str(path[-1]) for part in ("bias", "scale", "sink")):
            noise = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
            variable[...] = variable[...] + 0.5 * noise
    return layer


def given():
    x = np.random.default_rng(2).normal(size=(B, L, D)).astype(np.float32)
    return x, Context.of(B, L, valid_BL=jnp.asarray(HOLES))


@pytest.mark.parametrize("name", CASES)
def test_an_option_of_attention_equals_the_plain_loop(name):
    layer, (x, context) = layer_of(name), given()
    got = np.asarray(jax.jit(layer.__call__)(x, context)[0])
    position = np.asarray(context.position_BL)
    for b in range(B):
        wanted = reference(
            layer, x[b].astype(np.float64) * HOLES[b][:, None], HOLES[b], position[b]
        )
        # float32 sums of a few dozen products.
        np.testing.assert_allclose(got[b][HOLES[b]], wanted[HOLES[b]], rtol=2e-5, atol=2e-5)


def one_by_one(layer, first: int) -> np.ndarray:
    """Outputs where ``first`` tokens are read at once and the others one by one."""
    (x, context), step = given(), jax.jit(layer.__call__)
    memory, found = layer.empty_memory(B, L + 3, jnp.dtype("float32")), []
    cuts = [0, first, *range(first + 1, L + 1)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        at = np.s_[:, start:end]
        known = {"position_BL": context.position_BL[at], "valid_BL": context.valid_BL[at]}
        part = Context.of(B, end - start, **known)
        y, memory = step(x[at], part, memory, jnp.int32(start))
        found.append(y)
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", [name for name in CASES if "both ways" not in name])
def test_tokens_decoded_one_by_one_have_the_outputs_of_the_whole_sequence(name):
    layer, (x, context) = layer_of(name), given()
    whole = np.asarray(jax.jit(layer.__call__)(x, context)[0])
    np.testing.assert_allclose(one_by_one(layer, 4)[HOLES], whole[HOLES], rtol=1e-5, atol=1e-5)


LATENT = {
    "full queries": LatentOptions(kv_rank=6, plain_width=5, rope_width=4, value_width=3),
    "low-rank queries": LatentOptions(
        kv_rank=6, query_rank=7, plain_width=3, rope_width=6, value_width=5
    ),
}


def latent_of(name: str, **changes) -> LatentAttention:
    rope = RopeOptions(theta=50.0, interleaved=True)
    options = AttentionOptions(num_heads=4, rope=rope, implementation="xla", **changes)
    layer = LatentAttention(D, LATENT[name], options, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        if any(part in str(path[-1]) for part in ("bias", "scale")):
            noise = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
            variable[...] = variable[...] + 0.5 * noise
    return layer


def latent_reference(layer: LatentAttention, x: np.ndarray, valid, position):
    """One sequence, one query and one head at a time, with every key and value."""
    options, sizes, eps = layer.attention, layer.latent, layer.attention.qk_norm_eps
    leaf = lambda name: np.asarray(getattr(layer, name)[...], np.float64)
    bias = lambda name: leaf(name) if options.bias != "none" else 0.0
    rms = lambda a, norm: (
        a
        / np.sqrt((a**2).mean(-1, keepdims=True) + eps)
        * np.asarray(norm.scale_D[...], np.float64)
    )
    source = x
    if sizes.query_rank:
        source = rms(x @ leaf("query_down_DR") + bias("query_down_bias_R"), layer.query_norm)
    q = np.einsum("lr,rhi->lhi", source, leaf("query_RHI"))
    c = rms(x @ leaf("down_DR") + bias("down_bias_R"), layer.norm)
    k_turned = x @ leaf("key_rope_DI") + bias("key_rope_bias_I")
    k, v = (
        np.einsum("lr,rhi->lhi", c, leaf("key_RHI")),
        np.einsum("lr,rhv->lhv", c, leaf("value_RHI")),
    )
    y, plain = np.zeros_like(x), sizes.plain_width
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if valid[s]]
        for h in range(options.num_heads):
            turn = lambda a, s: turned(a, position[s], options.rope)
            z = [
                q[t, h, :plain] @ k[s, h] + turn(q[t, h, plain:], t) @ turn(k_turned[s], s)
                for s in seen
            ]
            w = np.exp(np.array(z) * (plain + sizes.rope_width) ** -0.5)
            y[t] += (w / w.sum()) @ v[seen, h] @ leaf("out_HID")[h]
    return y + (leaf("out_bias_D") if options.bias == "all" else 0)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_equals_the_plain_loop_and_its_compressed_memory(name, bias):
    layer, (x, context) = latent_of(name, bias=bias), given()
    got = np.asarray(jax.jit(layer.__call__)(x, context)[0])
    position = np.asarray(context.position_BL)
    for b in range(B):
        inputs = x[b].astype(np.float64) * HOLES[b][:, None]
        wanted = latent_reference(layer, inputs, HOLES[b], position[b])
        np.testing.assert_allclose(got[b][HOLES[b]], wanted[HOLES[b]], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(one_by_one(layer, 4)[HOLES], got[HOLES], rtol=1e-5, atol=1e-5)
    memory = layer.empty_memory(B, L, jnp.dtype("float32"))
    assert sum(x[0, 0].size for x in memory.kept) == 6 + layer.latent.rope_width
