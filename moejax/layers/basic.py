"""Norm, dense FFN and the matmul they share."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.experts import ffn_one, is_gated
from moejax.types import ExpertWeights


@contextlib.contextmanager
def own_promotion() -> Iterator[None]:
    """JAX's standard promotion of types and ranks, whatever the program around asks of its own
    code. Also a decorator."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


fan_in = nnx.initializers.lecun_normal()


def project(x: Float[Array, "... D"], weight: Array, contract: int = 1) -> Array:
    """``x @ weight`` over the last ``contract`` axes of x, computed on 2-D operands.

    On XLA:CPU the backward pass of a matmul with several leading axes takes up to 2.3 times as
    long as that of the same matmul flattened to [tokens, D].
    """
    lead, width = x.shape[: x.ndim - contract], weight.shape[contract:]
    rows = 1
    for size in x.shape[x.ndim - contract :]:
        rows *= size
    flat = x.reshape(-1, rows) @ weight.reshape(rows, -1).astype(x.dtype)
    return flat.reshape(*lead, *width)


def masked_mean(x_BLD: Float[Array, "B L D"], valid_BL: Bool[Array, "B L"]) -> Array:
    """Over valid tokens, float32; 0 without any."""
    total_BD = jnp.sum(jnp.where(valid_BL[..., None], x_BLD.astype(jnp.float32), 0.0), axis=1)
    count_B = jnp.sum(valid_BL, axis=1, dtype=jnp.float32)
    return total_BD / jnp.maximum(count_B, 1.0)[:, None]


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang, Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale_D[...]).astype(x.dtype)


class FFN(nnx.Module):
    """The dense feed-forward network: SwiGLU (Shazeer, arXiv 2002.05202), GELU or ReLU."""

    def __init__(self, d_model: int, d_ff: int, activation: str, *, rngs: nnx.Rngs):
        self.activation = activation
        if is_gated(activation):
            self.gate_DF = nnx.Param(fan_in(rngs.params(), (d_model, d_ff), jnp.float32))
        self.up_DF = nnx.Param(fan_in(rngs.params(), (d_model, d_ff), jnp.float32))
        self.down_FD = nnx.Param(fan_in(rngs.params(), (d_ff, d_model), jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate_DF = self.gate_DF[...] if is_gated(self.activation) else None
        weights = ExpertWeights(gate_DF, self.up_DF[...], self.down_FD[...])
        return ffn_one(weights, x.reshape(-1, x.shape[-1]), self.activation).reshape(x.shape)
