"""Self-attention with rotary positions and grouped queries."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.layers.basic import fan_in, project


def implementation_for(choice: str, dtype: jnp.dtype, head_dim: int) -> Literal["xla", "cudnn"]:
    """What "auto" stands for: cuDNN's fused kernel on a GPU for what it supports, else XLA.

    ``jax.nn.dot_product_attention`` leaves this choice to its caller (its own default is XLA).
    """
    if choice == "cudnn":
        return "cudnn"
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = half and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if choice == "auto" and jax.default_backend() == "gpu" and fits else "xla"


def rope(
    x_BLHI: Float[Array, "B L H I"], position_BL: Int[Array, "B L"], theta: float
) -> Float[Array, "B L H I"]:
    """Rotary position embedding, halves rotated against each other (Su et al., arXiv 2104.09864).

    Angles are position * theta^(-2i/I), computed in float32.
    """
    half = x_BLHI.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BL[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BLHI.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHI.dtype)


def attend(
    query_BLHI: Array,
    key_BLJI: Array,
    value_BLJI: Array,
    seen_BL: Bool[Array, "B L"] | None,
    causal: bool,
    implementation: str,
) -> Float[Array, "B L H I"]:
    """Softmax attention of H query heads to J key/value heads, to keys in ``seen_BL`` (all)."""
    mixed_BLHI = jax.nn.dot_product_attention(
        query_BLHI,
        key_BLJI,
        value_BLJI,
        mask=None if seen_BL is None else seen_BL[:, None, None, :],
        is_causal=causal,
        implementation=implementation_for(implementation, query_BLHI.dtype, query_BLHI.shape[-1]),
    )
    return checkpoint_name(mixed_BLHI, "attention")


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share J key/value heads (arXiv 2305.13245).

    ``causal``: a token sees itself and what is before it, else every valid token. ``theta``: base
    of the rotary angles; 0 for none. ``implementation``: "xla", "cudnn" (fused, GPU), or "auto"
    (see ``implementation_for``).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        theta: float,
        implementation: str,
        causal: bool = True,
        rngs: nnx.Rngs,
    ):
        self.theta, self.implementation, self.causal = theta, implementation, causal
        query, key_value = (d_model, num_heads * head_dim), (d_model, num_kv_heads * head_dim)
        self.query_DHI = nnx.Param(
            fan_in(rngs.params(), query, jnp.float32).reshape(d_model, num_heads, head_dim)
        )
        self.key_DJI = nnx.Param(
            fan_in(rngs.params(), key_value, jnp.float32).reshape(d_model, num_kv_heads, head_dim)
        )
        self.value_DJI = nnx.Param(
            fan_in(rngs.params(), key_value, jnp.float32).reshape(d_model, num_kv_heads, head_dim)
        )
        self.out_HID = nnx.Param(
            fan_in(rngs.params(), query[::-1], jnp.float32).reshape(num_heads, head_dim, d_model)
        )

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        position_BL: Int[Array, "B L"],
        valid_BL: Bool[Array, "B L"] | None = None,
        gaps: bool = False,
    ) -> Float[Array, "B L D"]:
        """``gaps``: what is not valid may lie between valid tokens (else, if causal, behind)."""
        query, key = project(x_BLD, self.query_DHI[...]), project(x_BLD, self.key_DJI[...])
        value = project(x_BLD, self.value_DJI[...])
        if self.theta:
            query, key = (rope(x, position_BL, self.theta) for x in (query, key))
        # What is causal has its padding behind it.
        seen_BL = valid_BL if gaps or not self.causal else None
        mixed_BLHI = attend(query, key, value, seen_BL, self.causal, self.implementation)
        return project(mixed_BLHI, self.out_HID[...], contract=2)
