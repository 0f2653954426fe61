"""Self-attention with rotary positions and grouped queries."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.layers.basic import fan_in, project
from moejax.options import AttentionOptions


def implementation_for(choice: str, dtype: jnp.dtype, head_dim: int) -> Literal["xla", "cudnn"]:
    """The kernel for a choice. "auto" is cuDNN's fused kernel on a GPU where it applies, or XLA.

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
    options: AttentionOptions,
    padded_behind: bool = False,
) -> Float[Array, "B L H I"]:
    """Softmax attention of H query heads to J key/value heads.

    A query attends to the valid keys of its own segment and, if ``options.causal``, to none behind
    it. A query without any key gets a finite value. ``padded_behind``: see ``Context``.
    """
    dtype, width = query_BLHI.dtype, query_BLHI.shape[-1]
    kernel = implementation_for(options.implementation, dtype, width)
    if kernel == "cudnn" and options.causal and padded_behind:
        valid_BL = None  # padding is behind every query that counts
    mask_BHLL = None if valid_BL is None else valid_BL[:, None, None, :]
    if segment_BL is not None:
        same_BHLL = segment_BL[:, None, :, None] == segment_BL[:, None, None, :]
        mask_BHLL = same_BHLL if mask_BHLL is None else mask_BHLL & same_BHLL
    if mask_BHLL is not None and kernel == "cudnn":
        # cuDNN takes no mask that must be broadcast over queries.
        batch, length = query_BLHI.shape[:2]
        mask_BHLL = jnp.broadcast_to(mask_BHLL, (batch, 1, length, length))
    mixed_BLHI = jax.nn.dot_product_attention(
        query_BLHI,
        key_BLJI,
        value_BLJI,
        mask=mask_BHLL,
        is_causal=options.causal,
        implementation=kernel,
    )
    return checkpoint_name(mixed_BLHI, "attention")


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share J key/value heads (arXiv 2305.13245).

    A token attends to valid tokens of its own segment only.
    """

    def __init__(self, d_model: int, options: AttentionOptions, *, rngs: nnx.Rngs):
        self.options = options
        heads, kv_heads, width = options.num_heads, options.num_kv_heads, options.width(d_model)

        def drawn(rows: int, columns: int, *shape: int) -> nnx.Param:
            return nnx.Param(fan_in(rngs.params(), (rows, columns), jnp.float32).reshape(shape))

        self.query_DHI = drawn(d_model, heads * width, d_model, heads, width)
        self.key_DJI = drawn(d_model, kv_heads * width, d_model, kv_heads, width)
        self.value_DJI = drawn(d_model, kv_heads * width, d_model, kv_heads, width)
        self.out_HID = drawn(heads * width, d_model, heads, width, d_model)

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
        if self.options.rope_theta:
            query, key = (rope(x, position_BL, self.options.rope_theta) for x in (query, key))
        mixed_BLHI = attend(query, key, value, valid_BL, segment_BL, self.options, padded_behind)
        return project(mixed_BLHI, self.out_HID[...], contract=2)
