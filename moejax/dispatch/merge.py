"""Merged experts: one FFN per span of tokens, whose weights are a mean of the experts'."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax import experts
from moejax.dispatch import exchange
from moejax.kernels.support import vary_over, varying_axes
from moejax.types import ExpertWeights, Merge, Order, Site

SPANS_AT_ONCE = 4
"""Spans merged in one go, if their number divides: merging reads all experts once for so many."""


def merge_experts(
    x_bLD: Float[Array, "b L D"], merge: Merge, weights: ExpertWeights, activation: str, site: Site
) -> Float[Array, "b L D"]:
    """y = f(x; sum_e w_e theta_e) for every span of every sequence. Partial sums over a split F.

    A few spans (C) after the other: each shard of experts adds up its own for C spans of every
    shard, and a reduce-scatter leaves each shard the FFNs of its spans. So a device holds C merged
    FFNs (and S * C partial ones, of S shards), however many spans there are. In the backward pass
    too, which merges once more; what is kept of a span is its hidden layer, as of any FFN.
    """
    sequences, length, width = x_bLD.shape
    spans = merge.weight_BNE.shape[1]
    order = Order() if merge.valid_BL is None else Order.of(merge.valid_BL)
    x_bLD = jnp.pad(order.tokens(x_bLD), ((0, 0), (0, spans * merge.span - length), (0, 0)))
    share_SMe = _own_shares(merge.weight_BNE, len(weights.up_EDF), site)
    # Declared here, sums over devices of gradients come after the loop. In it there would be one
    # for every turn: of the experts over `data`, of the tokens over `tensor`.
    axes = varying_axes(x_bLD, share_SMe, *jax.tree.leaves(weights))
    x_bLD, share_SMe, weights = jax.tree.map(
        lambda x: vary_over(x, axes), (x_bLD, share_SMe, weights)
    )
    at_once = max(c for c in range(1, SPANS_AT_ONCE + 1) if sequences * spans % c == 0)
    x_XCUD = x_bLD.reshape(-1, at_once, merge.span, width)
    share_SXCe = share_SMe.reshape(len(share_SMe), len(x_XCUD), at_once, -1)

    def some_spans(_: None, some: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _merge_and_run(*some, weights, activation, site)

    _, y_XCUD = jax.lax.scan(some_spans, None, (x_XCUD, jnp.swapaxes(share_SXCe, 0, 1)))
    return order.places(y_XCUD.reshape(sequences, -1, width)[:, :length])


def _own_shares(weight_BNE: Array, own: int, site: Site) -> Float[Array, "S M e"]:
    """This shard's experts' weights in the M spans of each shard: all that is gathered."""
    weight_ME = weight_BNE.reshape(-1, weight_BNE.shape[-1])
    weight_SME = exchange.gather_tokens(weight_ME, site).reshape(site.shards, *weight_ME.shape)
    first = exchange.shard_index(site) * own
    return jax.lax.dynamic_slice_in_dim(weight_SME, first, own, axis=2)


@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("experts"),
    prevent_cse=False,  # always in a loop
    static_argnums=(3, 4),
)
def _merge_and_run(
    x_CUD: Array, share_SCe: Array, weights: ExpertWeights, activation: str, site: Site
) -> Array:
    """C spans, each by its merged FFN."""
    merged = jax.tree.map(lambda w: _merged(w, share_SCe, site), weights)
    with jax.named_scope("experts"):
        merged = experts.cast(merged, x_CUD.dtype)
        gate_CUF = None if merged.gate_EDF is None else x_CUD @ merged.gate_EDF
        gate_CUF, up_CUF = checkpoint_name((gate_CUF, x_CUD @ merged.up_EDF), "experts")
        hidden_CUF = experts.activate(activation, gate_CUF, up_CUF)
        return checkpoint_name(hidden_CUF @ merged.down_EFD, "experts")


def _merged(w_e: Array, share_SCe: Array, site: Site) -> Array:
    """One matrix of C merged FFNs of this shard, from the experts of all, in float32."""
    share_Xe = share_SCe.reshape(-1, share_SCe.shape[-1])
    with jax.named_scope("experts"):
        # A batch axis of one: a policy of ``model.remat`` that keeps plain matrix products would
        # keep the merged FFNs of all spans.
        partial_1X = jnp.einsum(
            "zxe,zeij->zxij",
            share_Xe[None],
            w_e[None].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
    return exchange.scatter_sum(partial_1X[0], site)
