"""Self-attention, alike in training, in evaluation and token by token."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.layers.basic import RMSNorm, fan_in, project
from moejax.layers.rope import rotate
from moejax.options import AttentionOptions
from moejax.types import Context

MASKED = -1e30
"""The score of a key that a query may not see: finite, so that a query without any key has a finite
output and gradient."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of one layer's attention while decoding: S tokens, as many as a sequence may have.

    ``kept``: arrays [B, S, ...], keys and values, or what they are computed from. ``valid_BS``:
    False for padding, for tokens that are still to come, and for tokens that do not pass through a
    routed block. Both may be stacked over layers, and shapes or shardings in the place of arrays.
    """

    kept: tuple[Any, ...]
    valid_BS: Any

    @classmethod
    def empty(cls, batch: int, size: int, shapes: tuple[tuple[int, ...], ...], dtype) -> "Memory":
        """Room for ``size`` tokens, of which nothing is known yet."""
        kept = tuple(jnp.zeros((batch, size, *shape), dtype) for shape in shapes)
        return cls(kept, jnp.zeros((batch, size), bool))

    def extended(
        self, new: tuple[Array, ...], valid_BL: Bool[Array, "B L"], start: Int[Array, ""]
    ) -> "Memory":
        """With the next tokens, the first of which is number ``start``."""

        def put(kept_BS: Array, new_BL: Array) -> Array:
            new_BL = new_BL.astype(kept_BS.dtype)
            return jax.lax.dynamic_update_slice_in_dim(kept_BS, new_BL, start, axis=1)

        kept = tuple(put(*pair) for pair in zip(self.kept, new, strict=True))
        return Memory(kept, put(self.valid_BS, valid_BL))


def implementation_for(choice: str, dtype: jnp.dtype, head_dim: int) -> Literal["xla", "cudnn"]:
    """The kernel for a choice. "auto" is cuDNN's fused kernel on a GPU where it applies, or XLA.

    ``jax.nn.dot_product_attention`` leaves this choice to its caller (its own default is XLA).
    """
    if choice == "cudnn":
        return "cudnn"
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = half and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if choice == "auto" and jax.default_backend() == "gpu" and fits else "xla"


def visible(
    options: AttentionOptions,
    context: Context,
    valid_BS: Bool[Array, "B S"],
    start: Int[Array, ""] | int = 0,
) -> Bool[Array, "B L S"]:
    """True where a query may see a key.

    Keys are those of all S tokens, queries those of L of them from number ``start`` on. A query
    sees valid keys of its own segment and, if ``options.causal``, none behind it; with a window,
    only keys less than that far away, or in the same chunk of its segment.

    Raises:
      ValueError: segments of queries that are not all there is.
    """
    length, size = context.valid_BL.shape[1], valid_BS.shape[1]
    if context.segment_BL is not None and (length != size or not isinstance(start, int)):
        raise ValueError(
            "context.segment_BL: decoding with a memory takes one text per row; give each text a "
            "row of its own"
        )
    query_L1, key_S = start + jnp.arange(length)[:, None], jnp.arange(size)
    seen_BLS = jnp.broadcast_to(valid_BS[:, None, :], (len(valid_BS), length, size))
    if options.causal:
        seen_BLS &= key_S <= query_L1
    if context.segment_BL is not None:
        seen_BLS &= context.segment_BL[:, :, None] == context.segment_BL[:, None, :]
    if options.window and options.window_kind == "sliding":
        seen_BLS &= jnp.abs(query_L1 - key_S) < options.window
    elif options.window:
        chunk_BL = context.position_BL // options.window
        first_BL = query_L1[:, 0] - (context.position_BL - chunk_BL * options.window)
        seen_BLS &= key_S >= first_BL[..., None]
    return seen_BLS


def attend(
    query_BLHI: Array,
    key_BSJI: Array,
    value_BSJV: Array,
    options: AttentionOptions,
    context: Context,
    *,
    scale: float | None = None,
    sink_H: Array | None = None,
    memory: tuple[Bool[Array, "B S"], Int[Array, ""]] | None = None,
) -> Float[Array, "B L H V"]:
    """Softmax attention of H query heads to J key/value heads.

    Args:
      scale: the factor of the scores (None: 1 / sqrt(I)).
      sink_H: a logit that takes part in each head's softmax and has no value.
      memory: while decoding, the valid keys and the number of the first query; otherwise the keys
        are those of the queries' tokens.
    """
    factor: float = query_BLHI.shape[-1] ** -0.5 if scale is None else scale
    if memory is None and sink_H is None and options.is_fused:
        same_width = query_BLHI.shape[-1] == value_BSJV.shape[-1]
        mixed_BLHV = _fused(query_BLHI, key_BSJI, value_BSJV, options, context, factor, same_width)
    else:
        valid_BS, start = (context.valid_BL, 0) if memory is None else memory
        seen_BLS = visible(options, context, valid_BS, start)
        mixed_BLHV = _explicit(
            query_BLHI, key_BSJI, value_BSJV, seen_BLS, factor, options.score_cap, sink_H
        )
    return checkpoint_name(mixed_BLHV, "attention")


def _explicit(
    query_BLHI: Array,
    key_BSJI: Array,
    value_BSJV: Array,
    seen_BLS: Array,
    scale: float,
    cap: float,
    sink_H: Array | None,
) -> Array:
    """Scores and softmax in float32."""
    batch, length, heads, width = query_BLHI.shape
    kv_heads = key_BSJI.shape[2]
    query_BLJRI = query_BLHI.reshape(batch, length, kv_heads, heads // kv_heads, width)
    score_BJRLS = jnp.einsum(
        "bljri,bsji->bjrls", query_BLJRI, key_BSJI, preferred_element_type=jnp.float32
    )
    score_BJRLS *= scale
    if cap:
        score_BJRLS = cap * jnp.tanh(score_BJRLS / cap)
    score_BJRLS = jnp.where(seen_BLS[:, None, None], score_BJRLS, MASKED)
    if sink_H is not None:
        sink_JR11 = sink_H.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        shape = (*score_BJRLS.shape[:-1], 1)
        score_BJRLS = jnp.concatenate([score_BJRLS, jnp.broadcast_to(sink_JR11, shape)], axis=-1)
    weight_BJRLS = jax.nn.softmax(score_BJRLS, axis=-1)[..., : key_BSJI.shape[1]]
    mixed_BLJRV = jnp.einsum("bjrls,bsjv->bljrv", weight_BJRLS.astype(value_BSJV.dtype), value_BSJV)
    return mixed_BLJRV.reshape(batch, length, heads, -1)


def _fused(
    query_BLHI: Array,
    key_BLJI: Array,
    value_BLJV: Array,
    options: AttentionOptions,
    context: Context,
    scale: float,
    same_width: bool,
) -> Array:
    """`jax.nn.dot_product_attention`, which asks for values as wide as keys."""
    dtype, width = query_BLHI.dtype, query_BLHI.shape[-1]
    out = value_BLJV.shape[-1]
    if not same_width:
        value_BLJV = jnp.pad(value_BLJV, [(0, 0)] * 3 + [(0, width - out)])
    kernel = implementation_for(options.implementation, dtype, width)
    valid_BL, segment_BL = context.valid_BL, context.segment_BL
    if kernel == "cudnn" and options.causal and context.padded_behind:
        valid_BL = None  # padding is behind every query that counts
    mask_BHLL = None if valid_BL is None else valid_BL[:, None, None, :]
    if segment_BL is not None:
        same_BHLL = segment_BL[:, None, :, None] == segment_BL[:, None, None, :]
        mask_BHLL = same_BHLL if mask_BHLL is None else mask_BHLL & same_BHLL
    if mask_BHLL is not None and kernel == "cudnn":
        # cuDNN takes no mask that must be broadcast over queries.
        batch, length = query_BLHI.shape[:2]
        mask_BHLL = jnp.broadcast_to(mask_BHLL, (batch, 1, length, length))
    reach = max(options.window - 1, 0)
    mixed_BLHV = jax.nn.dot_product_attention(
        query_BLHI,
        key_BLJI,
        value_BLJV,
        mask=mask_BHLL,
        scale=scale,
        is_causal=options.causal,
        local_window_size=(reach, 0 if options.causal else reach) if options.window else None,
        implementation=kernel,
    )
    return mixed_BLHV[..., :out]


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share J key/value heads (arXiv 2305.13245).

    A token attends to valid tokens of its own segment only. See `moejax.options.AttentionOptions`.
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
        if options.bias != "none":
            self.query_bias_HI = nnx.Param(jnp.zeros((heads, width)))
            self.key_bias_JI = nnx.Param(jnp.zeros((kv_heads, width)))
            self.value_bias_JI = nnx.Param(jnp.zeros((kv_heads, width)))
        if options.bias == "all":
            self.out_bias_D = nnx.Param(jnp.zeros(d_model))
        if options.qk_norm in ("head", "projection"):
            whole = options.qk_norm == "projection"
            eps = options.qk_norm_eps
            self.query_norm = RMSNorm(heads * width if whole else width, eps)
            self.key_norm = RMSNorm(kv_heads * width if whole else width, eps)
        if options.sinks:
            self.sink_H = nnx.Param(jnp.zeros(heads))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        context: Context,
        memory: Memory | None = None,
        start: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B L D"], Memory | None]:
        """The output, and the memory with these tokens, of which the first is number ``start``."""
        options = self.options
        # Padding may hold anything. A NaN would survive the weight 0 in the sum of values.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        query_BLHI, key_BLJI, value_BLJI = self._projected(x_BLD)
        query_BLHI, key_BLJI = self._placed(query_BLHI, key_BLJI, context)
        known = None
        if memory is not None:
            assert start is not None
            memory = memory.extended((key_BLJI, value_BLJI), context.valid_BL, start)
            key_BLJI, value_BLJI = (x.astype(x_BLD.dtype) for x in memory.kept)
            known = memory.valid_BS, start
        mixed_BLHI = attend(
            query_BLHI,
            key_BLJI,
            value_BLJI,
            options,
            context,
            scale=options.scale or None,
            sink_H=self.sink_H[...] if options.sinks else None,
            memory=known,
        )
        y_BLD = project(mixed_BLHI, self.out_HID[...], contract=2)
        if options.bias == "all":
            y_BLD += self.out_bias_D[...].astype(y_BLD.dtype)
        return y_BLD, memory

    def empty_memory(self, batch: int, size: int, dtype: jnp.dtype) -> Memory:
        """Memory for ``size`` tokens of each sequence."""
        shape = self.key_DJI[...].shape[-2:]
        return Memory.empty(batch, size, (shape, shape), dtype)

    def _projected(self, x_BLD: Array) -> tuple[Array, Array, Array]:
        options = self.options
        query = project(x_BLD, self.query_DHI[...])
        key = project(x_BLD, self.key_DJI[...])
        value = project(x_BLD, self.value_DJI[...])
        if options.bias != "none":
            query += self.query_bias_HI[...].astype(x_BLD.dtype)
            key += self.key_bias_JI[...].astype(x_BLD.dtype)
            value += self.value_bias_JI[...].astype(x_BLD.dtype)
        return query, key, value

    def _placed(self, query: Array, key: Array, context: Context) -> tuple[Array, Array]:
        """Normalised and rotated to their positions."""
        options = self.options
        if options.qk_norm in ("head", "projection"):
            query, key = self._normed(query, self.query_norm), self._normed(key, self.key_norm)
        if options.rope.theta is not None:
            query, key = (rotate(x, context.position_BL, options.rope) for x in (query, key))
            if options.qk_norm == "unit":
                query, key = (unit(x, options.qk_norm_eps) for x in (query, key))
        elif options.temperature:
            query *= temperature(context.position_BL, options)[..., None, None].astype(query.dtype)
        return query, key

    def _normed(self, x_BLHI: Array, norm: RMSNorm) -> Array:
        if self.options.qk_norm == "head":
            return norm(x_BLHI)
        return norm(x_BLHI.reshape(*x_BLHI.shape[:2], -1)).reshape(x_BLHI.shape)


def unit(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps), without weights, in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


def temperature(position_BL: Int[Array, "B L"], options: AttentionOptions) -> Array:
    """1 + temperature * ln(1 + floor((position + 1) / temperature_length)) (Llama 4)."""
    block_BL = jnp.floor((position_BL + 1.0) / options.temperature_length)
    return 1.0 + options.temperature * jnp.log1p(block_BL)
