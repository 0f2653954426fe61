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
    valid_BL: Bool[Array, "B L"] | None,
    segment_BL: Int[Array, "B L"] | None,
    causal: bool,
    implementation: str,
    padded_behind: bool = False,
) -> Float[Array, "B L H I"]:
    """Softmax attention of H query heads to J key/value heads: to the valid keys of a query's own
    segment and, if ``causal``, none behind it. A query without any gets a finite value.

    ``padded_behind``: see ``Context``.
    """
    kernel = implementation_for(implementation, query_BLHI.dtype, query_BLHI.shape[-1])
    if kernel == "cudnn" and causal and padded_behind:
        valid_BL = None  # what is not valid is behind every query that counts
    mask_BHLL = None if valid_BL is None else valid_BL[:, None, None, :]
    if segment_BL is not None:
        same_BHLL = segment_BL[:, None, :, None] == segment_BL[:, None, None, :]
        mask_BHLL = same_BHLL if mask_BHLL is None else mask_BHLL & same_BHLL
    if mask_BHLL is not None and kernel == "cudnn":
        # It takes no mask that is to be broadcast over queries.
        batch, length = query_BLHI.shape[:2]
        mask_BHLL = jnp.broadcast_to(mask_BHLL, (batch, 1, length, length))
    mixed_BLHI = jax.nn.dot_product_attention(
        query_BLHI,
        key_BLJI,
        value_BLJI,
        mask=mask_BHLL,
        is_causal=causal,
        implementation=kernel,
    )
    return checkpoint_name(mixed_BLHI, "attention")


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share J key/value heads (arXiv 2305.13245).

    ``causal``: a token sees itself and the valid tokens before it, else every valid token; of
    several segments, its own only. ``theta``: base of the rotary angles; 0 for none.
    ``implementation``: "xla", "cudnn" (fused, GPU), or "auto" (see ``implementation_for``).
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
        segment_BL: Int[Array, "B L"] | None = None,
        padded_behind: bool = False,
    ) -> Float[Array, "B L D"]:
        """``valid_BL``, ``segment_BL`` and ``padded_behind``: as in ``Context``."""
        if valid_BL is not None:
            # Padding may hold anything. A NaN would survive the weight 0 in the sum of values.
            x_BLD = jnp.where(valid_BL[..., None], x_BLD, 0)
        query, key = project(x_BLD, self.query_DHI[...]), project(x_BLD, self.key_DJI[...])
        value = project(x_BLD, self.value_DJI[...])
        if self.theta:
            query, key = (rope(x, position_BL, self.theta) for x in (query, key))
        known = (valid_BL, segment_BL, self.causal, self.implementation, padded_behind)
        mixed_BLHI = attend(query, key, value, *known)
        return project(mixed_BLHI, self.out_HID[...], contract=2)
