"""Functions of token ids: frequency-balanced tables and hashes of pairs (hash layers)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from moejax.types import GateContext, valid_before


def balanced_table(
    counts_V: Int[Array, "V"], num_experts: int, key: PRNGKeyArray | None = None
) -> Int[Array, "V"]:
    """Deals token ids to experts, the most frequent first, each to the least loaded expert.

    With a key, ids whose counts are within a factor of 2 may change places in the order. Whatever
    the order, no expert is loaded by more than the mean plus the largest count. Ids that do not
    occur go to the expert with the fewest ids. Ties go to the lower expert and the lower id.
    """
    rank_V = counts_V.astype(jnp.float32)
    if key is not None:
        rank_V *= jax.random.uniform(key, counts_V.shape, jnp.float32, 1.0, 2.0)
    order_V = jnp.argsort(-rank_V, stable=True)

    def deal(carry: tuple[Array, Array], count: Array) -> tuple[tuple[Array, Array], Array]:
        load_E, ids_E = carry
        expert = jnp.argmin(jnp.where(count > 0, load_E, ids_E)).astype(jnp.int32)
        return (load_E.at[expert].add(count), ids_E.at[expert].add(1)), expert

    zero_E = jnp.zeros(num_experts, jnp.int32)
    _, expert_V = lax.scan(deal, (zero_E, zero_E), counts_V[order_V])
    return jnp.zeros_like(expert_V).at[order_V].set(expert_V, unique_indices=True)


def bigram_hash(context: GateContext, salt_K: Int[Array, "K"]) -> UInt32[Array, "G T K"]:
    """32 bits that look random for each pair of a token and the one before, for each salt.

    The one before is the last valid one of the same text.
    """
    shape = (context.row_GR.size, -1)
    token_BL, segment_BL = context.token_GT.reshape(shape), context.segment_GT.reshape(shape)
    before_BL = valid_before(context.valid_GT.reshape(shape))
    at_BL = jnp.maximum(before_BL, 0)
    follows_BL = jnp.take_along_axis(segment_BL, at_BL, axis=1) == segment_BL
    previous_BL = jnp.take_along_axis(token_BL, at_BL, axis=1)
    previous_BL = jnp.where(follows_BL & (before_BL >= 0), previous_BL, -1)
    token_GT1 = context.token_GT.astype(jnp.uint32)[..., None]
    previous_GT1 = previous_BL.reshape(context.token_GT.shape).astype(jnp.uint32)[..., None]
    return _scramble(_scramble(token_GT1 ^ salt_K.astype(jnp.uint32)) + previous_GT1)


def _scramble(bits: Array) -> Array:
    """A bijection of 32-bit words in which every bit depends on every other (xor, shift, odd)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
