"""Merged experts: one FFN per span of tokens, whose weights are a mean of the experts'."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import experts
from moejax.dispatch import exchange
from moejax.dispatch.exchange import Site
from moejax.types import ExpertWeights, Merge


def merge_experts(
    x_bLD: Float[Array, "b L D"], merge: Merge, weights: ExpertWeights, activation: str, site: Site
) -> Float[Array, "b L D"]:
    """y = f(x; sum_e w_e theta_e) for every span of every sequence. Partial sums over a split F.

    One span at a time, so that one merged FFN per device is alive, backwards too: each shard adds
    up its own experts for the spans of all shards, and a reduce-scatter leaves each its own.
    """
    sequences, length, width = x_bLD.shape
    spans = merge.weight_BNE.shape[1]
    x_bLD = jnp.pad(x_bLD, ((0, 0), (0, spans * merge.span - length), (0, 0)))
    x_NSD = x_bLD.reshape(-1, merge.span, width)
    weight_NE = merge.weight_BNE.reshape(len(x_NSD), -1)

    @jax.checkpoint
    def one_span(_: None, span: tuple[Array, Array], weights: ExpertWeights) -> tuple[None, Array]:
        x_SD, weight_E = span
        merged = jax.tree.map(lambda w: _merged(w, weight_E, site), weights)
        with jax.named_scope("experts"):
            return None, experts.ffn_one(merged, x_SD, activation)

    _, y_NSD = jax.lax.scan(
        lambda carry, span: one_span(carry, span, weights), None, (x_NSD, weight_NE)
    )
    return y_NSD.reshape(sequences, -1, width)[:, :length]


def _merged(w_e: Float[Array, "e ..."], weight_E: Float[Array, "E"], site: Site) -> Array:
    """This shard's merged weight, from the experts of all shards, in float32."""
    weight_SE = exchange.gather_tokens(weight_E[None], site)
    first = exchange.shard_index(site) * len(w_e)
    own_Se = jax.lax.dynamic_slice_in_dim(weight_SE, first, len(w_e), axis=1)
    partial = jnp.tensordot(own_Se, w_e, axes=1)
    return exchange.scatter_sum(partial, site)[0]
