"""Multi-head latent attention: keys and values of all heads from one short vector per token."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.layers.attention import Memory, attend
from moejax.layers.basic import RMSNorm, fan_in, project
from moejax.layers.rope import rotate
from moejax.options import AttentionOptions, LatentOptions
from moejax.types import Context


class LatentAttention(nnx.Module):
    r"""Multi-head latent attention, with the interface of `moejax.layers.attention.Attention`.

    .. math::
       c_s = \operatorname{norm}(x_s W^{c}), \quad k^r_s = \operatorname{rope}(x_s W^{kr}), \quad
       q_t = \operatorname{norm}(x_t W^{a}) W^{b}, \\
       z_{ts} = q^p_t \cdot (c_s W^{k}) + \operatorname{rope}(q^r_t) \cdot k^r_s, \quad
       y_t = \sum_s \operatorname{softmax}(z)_{ts} \, (c_s W^{v}) W^{o}

    R = ``kv_rank`` numbers c and the I = ``rope_width`` rotated ones are all that is remembered of
    a token. While decoding, W^k and W^v are applied to queries and to mixed latent vectors instead,
    so that no key or value is ever computed. Without ``query_rank``, queries are x W^b.

    References: DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1; "DeepSeek-V3", arXiv
    2412.19437.
    """

    def __init__(
        self, d_model: int, latent: LatentOptions, attention: AttentionOptions, *, rngs: nnx.Rngs
    ):
        self.latent, self.attention = latent, attention
        heads, rank, eps = attention.num_heads, latent.kv_rank, attention.qk_norm_eps
        whole = latent.plain_width + latent.rope_width

        def drawn(rows: int, columns: int, *shape: int) -> nnx.Param:
            return nnx.Param(fan_in(rngs.params(), (rows, columns), jnp.float32).reshape(shape))

        source = latent.query_rank or d_model
        if latent.query_rank:
            self.query_down_DR = drawn(d_model, latent.query_rank, d_model, latent.query_rank)
            self.query_norm = RMSNorm(latent.query_rank, eps)
        self.query_RHI = drawn(source, heads * whole, source, heads, whole)
        self.down_DR = drawn(d_model, rank, d_model, rank)
        self.norm = RMSNorm(rank, eps)
        self.key_rope_DI = drawn(d_model, latent.rope_width, d_model, latent.rope_width)
        self.key_RHI = drawn(rank, heads * latent.plain_width, rank, heads, latent.plain_width)
        self.value_RHI = drawn(rank, heads * latent.value_width, rank, heads, latent.value_width)
        self.out_HID = drawn(
            heads * latent.value_width, d_model, heads, latent.value_width, d_model
        )
        if attention.bias != "none":
            if latent.query_rank:
                self.query_down_bias_R = nnx.Param(jnp.zeros(latent.query_rank))
            self.down_bias_R = nnx.Param(jnp.zeros(rank))
            self.key_rope_bias_I = nnx.Param(jnp.zeros(latent.rope_width))
        if attention.bias == "all":
            self.out_bias_D = nnx.Param(jnp.zeros(d_model))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        context: Context,
        memory: Memory | None = None,
        start: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B L D"], Memory | None]:
        """See `moejax.layers.attention.Attention`."""
        # Padding may hold anything. A NaN would survive the weight 0 in the sum of values.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        plain_BLHI, turned_BLHI = self._queries(x_BLD, context)
        latent_BLR, key_BL1I = self._remembered(x_BLD, context)
        scale = self.attention.scale or ((self.latent.plain_width + self.latent.rope_width) ** -0.5)
        if memory is None:
            mixed_BLHV = self._expanded(
                plain_BLHI, turned_BLHI, latent_BLR, key_BL1I, context, scale
            )
        else:
            assert start is not None
            new = latent_BLR, key_BL1I[:, :, 0]
            memory = memory.extended(new, context.valid_BL, start)
            mixed_BLHV = self._absorbed(plain_BLHI, turned_BLHI, memory, context, scale, start)
        y_BLD = project(mixed_BLHV, self.out_HID[...], contract=2)
        if self.attention.bias == "all":
            y_BLD += self.out_bias_D[...].astype(y_BLD.dtype)
        return y_BLD, memory

    def empty_memory(self, batch: int, size: int, dtype: jnp.dtype) -> Memory:
        """Memory for ``size`` tokens of each sequence."""
        shapes = (self.latent.kv_rank,), (self.latent.rope_width,)
        return Memory.empty(batch, size, shapes, dtype)

    def _queries(self, x_BLD: Array, context: Context) -> tuple[Array, Array]:
        if self.latent.query_rank:
            x_BLD = self._down(x_BLD, self.query_down_DR, "query_down_bias_R")
            x_BLD = self.query_norm(x_BLD)
        query_BLHI = project(x_BLD, self.query_RHI[...])
        plain_BLHI, turned_BLHI = jnp.split(query_BLHI, [self.latent.plain_width], axis=-1)
        return plain_BLHI, rotate(turned_BLHI, context.position_BL, self.attention.rope)

    def _remembered(self, x_BLD: Array, context: Context) -> tuple[Array, Array]:
        latent_BLR = self.norm(self._down(x_BLD, self.down_DR, "down_bias_R"))
        key_BL1I = self._down(x_BLD, self.key_rope_DI, "key_rope_bias_I")[:, :, None]
        return latent_BLR, rotate(key_BL1I, context.position_BL, self.attention.rope)

    def _down(self, x_BLD: Array, weight: nnx.Param, bias: str) -> Array:
        y = project(x_BLD, weight[...])
        return y if self.attention.bias == "none" else y + getattr(self, bias)[...].astype(y.dtype)

    def _expanded(
        self, plain: Array, turned: Array, latent: Array, key: Array, context: Context, scale: float
    ) -> Array:
        """With the keys and values of all heads."""
        key_BLHI = project(latent, self.key_RHI[...])
        value_BLHV = project(latent, self.value_RHI[...])
        shared_BLHI = jnp.broadcast_to(key, (*key_BLHI.shape[:-1], key.shape[-1]))
        query_BLHI = jnp.concatenate([plain, turned], axis=-1)
        key_BLHI = jnp.concatenate([key_BLHI, shared_BLHI], axis=-1)
        return attend(query_BLHI, key_BLHI, value_BLHV, self.attention, context, scale=scale)

    def _absorbed(
        self,
        plain: Array,
        turned: Array,
        memory: Memory,
        context: Context,
        scale: float,
        start: Int[Array, ""],
    ) -> Array:
        """With latent vectors as the keys and values of all heads."""
        latent_BSR, key_BSI = (x.astype(plain.dtype) for x in memory.kept)
        key_RHI, value_RHI = (w[...].astype(plain.dtype) for w in (self.key_RHI, self.value_RHI))
        query_BLHR = jnp.einsum("blhi,rhi->blhr", plain, key_RHI)
        query_BLHR = jnp.concatenate([query_BLHR, turned], axis=-1)
        key_BSR = jnp.concatenate([latent_BSR, key_BSI], axis=-1)
        mixed_BLHR = attend(
            query_BLHR,
            key_BSR[:, :, None],
            latent_BSR[:, :, None],
            self.attention,
            context,
            scale=scale,
            memory=(memory.valid_BS, start),
        )
        return jnp.einsum("blhr,rhv->blhv", mixed_BLHR, value_RHI)
