"""Norm, dense FFN, their matmul, and the switch between training and evaluation."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.experts import ffn_one, is_gated
from moejax.options import FFNOptions
from moejax.types import ExpertWeights


@contextlib.contextmanager
def own_promotion() -> Iterator[None]:
    """JAX's standard promotion of types and ranks, whatever the surrounding program has set.

    Also a decorator."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


fan_in = nnx.initializers.lecun_normal()


class TrainOrEval(nnx.Module):
    """A module that behaves differently in training and in evaluation.

    ``deterministic`` is Flax's switch for such modules: ``model.train()``, ``model.eval()``,
    ``model.set_attributes`` and ``nnx.view`` set it. The argument ``train`` of a call overrides it.
    """

    deterministic: bool = False

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the switch; called by ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic


def is_training(module: TrainOrEval, train: bool | None) -> bool:
    """The argument ``train`` of a call, or the module's switch where it is None.

    Not a method: ``nnx.tabulate`` traces every public one, and this must be known while tracing.
    """
    if train is not None and not isinstance(train, (bool, np.bool_)):
        raise ValueError(
            f"train={train!r} must be True, False or None (the mode that module.train() or "
            "module.eval() set last), and known while tracing"
        )
    return not module.deterministic if train is None else bool(train)


def project(x: Float[Array, "... D"], weight: Array, contract: int = 1) -> Array:
    """``x @ weight`` over the last ``contract`` axes of x, computed on 2-D operands.

    On XLA:CPU the backward pass of a matmul with several leading axes takes up to 2.3 times as
    long as that of the same matmul on [tokens, D].
    """
    lead, width = x.shape[: x.ndim - contract], weight.shape[contract:]
    rows = 1
    for size in x.shape[x.ndim - contract :]:
        rows *= size
    flat = x.reshape(-1, rows) @ weight.reshape(rows, -1).astype(x.dtype)
    return flat.reshape(*lead, *width)


def masked_mean(x_BLD: Float[Array, "B L D"], valid_BL: Bool[Array, "B L"]) -> Array:
    """The mean over valid tokens in float32; 0 without any."""
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


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(variance + eps) * scale + bias, in float32 (arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float = 1e-5):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias_D = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale_D[...] + self.bias_D[...]
        return y.astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class FFN(nnx.Module):
    """The dense feed-forward network: SwiGLU (Shazeer, arXiv 2002.05202), GELU or ReLU."""

    def __init__(
        self,
        d_model: int,
        options: FFNOptions,
        param_dtype: Any = jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = options.activation
        wide, narrow = (d_model, options.d_ff), (options.d_ff, d_model)
        if is_gated(options.activation):
            self.gate_DF = nnx.Param(fan_in(rngs.params(), wide, param_dtype))
        self.up_DF = nnx.Param(fan_in(rngs.params(), wide, param_dtype))
        self.down_FD = nnx.Param(fan_in(rngs.params(), narrow, param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate_DF = self.gate_DF[...] if is_gated(self.activation) else None
        weights = ExpertWeights(gate_DF, self.up_DF[...], self.down_FD[...])
        return ffn_one(weights, x.reshape(-1, x.shape[-1]), self.activation).reshape(x.shape)
