"""A decoder language model and its training step in plain JAX, the reference of `bench_step.py`.

The dense model of `moejax.tasks.language.model` (RMSNorm, rotary positions, causal attention,
SwiGLU, tied embedding) with AdamW, written the way one writes it by hand: parameters in a list of
dicts, a Python loop over layers, no mesh, no metrics beyond the loss.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def from_ours(params: Params, num_layers: int) -> Params:
    """Our parameters (dense, stacked over layers) in the plain layout."""
    block = params["periods"]["blocks"]["0"]
    attention, ffn = block["attention"], block["ffn"]

    def layer(i: int) -> Params:
        width = attention["query_DHI"].shape[1]
        flat = {
            "query": attention["query_DHI"][i].reshape(width, -1),
            "key": attention["key_DJI"][i].reshape(width, -1),
            "value": attention["value_DJI"][i].reshape(width, -1),
            "out": attention["out_HID"][i].reshape(-1, width),
            "gate": ffn["gate_DF"][i],
            "up": ffn["up_DF"][i],
            "down": ffn["down_FD"][i],
            "attention_norm": block["attention_norm"]["scale_D"][i],
            "ffn_norm": block["ffn_norm"]["scale_D"][i],
        }
        return flat

    return {
        "embed": jnp.array(params["embed_VD"]),
        "layers": [layer(i) for i in range(num_layers)],
        "norm": jnp.array(params["final_norm"]["scale_D"]),
    }


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope(x: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(layer: Params, x: jax.Array, heads: int, theta: float) -> jax.Array:
    batch, length, width = x.shape
    flat = x.reshape(-1, width)
    query, key, value = (
        (flat @ layer[name]).reshape(batch, length, heads, -1) for name in ("query", "key", "value")
    )
    query, key = rope(query, theta), rope(key, theta)
    scores = jnp.einsum("blhi,bmhi->bhlm", query, key) / math.sqrt(query.shape[-1])
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhlm,bmhi->blhi", weights, value)
    return (mixed.reshape(-1, mixed.shape[2] * mixed.shape[3]) @ layer["out"]).reshape(x.shape)


def ffn(layer: Params, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    hidden = jax.nn.silu(flat @ layer["gate"]) * (flat @ layer["up"])
    return (hidden @ layer["down"]).reshape(x.shape)


def loss_of(params: Params, tokens: jax.Array, model: Any) -> jax.Array:
    """Mean cross-entropy of the next token; ``tokens`` is int32[B, L + 1]."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["embed"][inputs] * math.sqrt(model.d_model)
    for layer in params["layers"]:
        normed = rms_norm(x, layer["attention_norm"], model.norm_eps)
        x = x + attention(layer, normed, model.attention.num_heads, model.attention.rope.theta)
        x = x + ffn(layer, rms_norm(x, layer["ffn_norm"], model.norm_eps))
    x = rms_norm(x, params["norm"], model.norm_eps)
    logits = (x.reshape(-1, x.shape[-1]) @ params["embed"].T).reshape(*targets.shape, -1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target)


def init_moments(params: Params) -> Params:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return {"first": zeros(), "second": zeros(), "step": jnp.int32(0)}


def make_step(model: Any, optim: Any, steps: int) -> Any:
    """The jitted update ``(params, moments, tokens) -> (params, moments, loss)``: AdamW, cosine."""

    def step(params: Params, moments: Params, tokens: jax.Array) -> tuple[Params, Params, Any]:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, model)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        shrink = jnp.where(norm < optim.clip_norm, 1.0, optim.clip_norm / norm)
        count = moments["step"] + 1
        warm = jnp.minimum(1.0, count / optim.warmup_steps)
        done = jnp.clip((count - optim.warmup_steps) / (steps - optim.warmup_steps), 0, 1)
        fall = (1 - optim.final_fraction) * (1 - jnp.cos(math.pi * done)) / 2
        rate = optim.learning_rate * warm * (1 - fall)

        def update(w: jax.Array, g: jax.Array, first: jax.Array, second: jax.Array) -> Any:
            g = g * shrink
            first = optim.b1 * first + (1 - optim.b1) * g
            second = optim.b2 * second + (1 - optim.b2) * g * g
            mean, square = first / (1 - optim.b1**count), second / (1 - optim.b2**count)
            direction = mean / (jnp.sqrt(square) + optim.eps)
            decay = optim.weight_decay if w.ndim > 1 else 0.0
            return w - rate * (direction + decay * w), first, second

        flat, structure = jax.tree.flatten(params)
        rows = zip(
            flat,
            jax.tree.leaves(grads),
            jax.tree.leaves(moments["first"]),
            jax.tree.leaves(moments["second"]),
            strict=True,
        )
        new = [update(*row) for row in rows]
        params, first, second = (
            jax.tree.unflatten(structure, column) for column in zip(*new, strict=True)
        )
        return params, {"first": first, "second": second, "step": count}, loss

    return jax.jit(step, donate_argnums=(0, 1))
