"""Merged experts: one FFN per span of tokens, whose weights are a mean of the experts'."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax import experts
from moejax.dispatch import exchange
from moejax.dispatch.exchange import Site
from moejax.kernels.vma import vary_over, varying_axes
from moejax.types import ExpertWeights, Merge


def merge_experts(
    x_bLD: Float[Array, "b L D"], merge: Merge, weights: ExpertWeights, activation: str, site: Site
) -> Float[Array, "b L D"]:
    """y = f(x; sum_e w_e theta_e) for every span of every sequence. Partial sums over a split F.

    One span after the other: each shard of experts adds up its own for one span of every shard,
    and a reduce-scatter leaves each shard the FFN of its span. So a device holds one merged FFN
    (and S partial ones, of S shards), however many spans there are. In the backward pass too, which
    merges once more; what is kept of a span is its hidden layer, as of any FFN.
    """
    sequences, length, width = x_bLD.shape
    spans = merge.weight_BNE.shape[1]
    x_bLD = jnp.pad(x_bLD, ((0, 0), (0, spans * merge.span - length), (0, 0)))
    x_MUD = x_bLD.reshape(-1, merge.span, width)
    share_MSe = _own_shares(merge.weight_BNE, len(weights.up_EDF), site)
    # Declared here, sums over devices of gradients come after the loop. In it there would be one
    # for every span: of the experts over `data`, of the tokens over `tensor`.
    axes = varying_axes(x_MUD, share_MSe, *jax.tree.leaves(weights))
    x_MUD, share_MSe, weights = jax.tree.map(
        lambda x: vary_over(x, axes), (x_MUD, share_MSe, weights)
    )

    def one_span(_: None, span: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _merge_and_run(*span, weights, activation, site)

    _, y_MUD = jax.lax.scan(one_span, None, (x_MUD, share_MSe))
    return y_MUD.reshape(sequences, -1, width)[:, :length]


def _own_shares(
    weight_BNE: Float[Array, "b N E"], own: int, site: Site
) -> Float[Array, "M S e"]:
    """This shard's experts' weights in the M spans of each shard: all that is gathered."""
    weight_ME = weight_BNE.reshape(-1, weight_BNE.shape[-1])
    weight_SME = exchange.gather_tokens(weight_ME, site).reshape(site.shards, *weight_ME.shape)
    first = exchange.shard_index(site) * own
    return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(weight_SME, first, own, axis=2), 0, 1)


@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("experts"),
    prevent_cse=False,  # always in a loop
    static_argnums=(3, 4),
)
def _merge_and_run(
    x_UD: Array, share_Se: Array, weights: ExpertWeights, activation: str, site: Site
) -> Array:
    merged = jax.tree.map(lambda w: _merged(w, share_Se, site), weights)
    with jax.named_scope("experts"):
        merged = experts.cast(merged, x_UD.dtype)
        gate_UF = None if merged.gate_EDF is None else x_UD @ merged.gate_EDF
        gate_UF, up_UF = checkpoint_name((gate_UF, x_UD @ merged.up_EDF), "experts")
        return experts.activate(activation, gate_UF, up_UF) @ merged.down_EFD


def _merged(w_e: Array, share_Se: Array, site: Site) -> Array:
    """One matrix of this shard's merged FFN, from the experts of all shards, in float32."""
    with jax.named_scope("experts"):
        # A batch axis of one: a policy of ``model.remat`` that keeps plain matrix products would
        # keep the merged FFNs of all spans.
        partial_1S = jnp.einsum(
            "zse,zeij->zsij",
            share_Se[None],
            w_e[None].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
    return exchange.scatter_sum(partial_1S[0], site)[0]
