"""Soft MoE: the experts work on slots, weighted means of a group's tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import experts
from moejax.dispatch import exchange
from moejax.dispatch.exchange import Site
from moejax.types import ExpertWeights, Slots


def mix_slots(
    x_gTD: Float[Array, "g T D"],
    mixing: Slots,
    weights: ExpertWeights,
    activation: str,
    site: Site,
) -> Float[Array, "g T D"]:
    """y = combine f(dispatch^T x), one all-to-all each way. Partial sums over a split F.

    Slots are cells that are always full, so this is ``transports.cells`` without a plan.
    """
    groups, _, width = x_gTD.shape
    own, slots = len(weights.up_EDF), mixing.dispatch_GTX.shape[-1]
    with jax.named_scope("pack"):
        mixed_gXD = jnp.einsum("gtd,gtx->gxd", x_gTD, mixing.dispatch_GTX.astype(x_gTD.dtype))
        # Slots by owner first: [S, e, g * P, D].
        by_owner = mixed_gXD.reshape(groups, site.shards, own, -1, width)
        cells_SXD = by_owner.transpose(1, 2, 0, 3, 4).reshape(site.shards, -1, width)
    received_SXD = exchange.swap_shards(cells_SXD, site)
    with jax.named_scope("experts"):
        cells_SeCD = received_SXD.reshape(site.shards, own, -1, width)
        out_SeCD = experts.ffn_cells(weights, cells_SeCD, activation)
    back_SXD = exchange.swap_shards(out_SeCD.reshape(cells_SXD.shape), site)
    with jax.named_scope("unpack"):
        by_group = back_SXD.reshape(site.shards, own, groups, -1, width).transpose(2, 0, 1, 3, 4)
        out_gXD = by_group.reshape(groups, slots, width)
        return jnp.einsum("gxd,gtx->gtd", out_gXD, mixing.combine_GTX.astype(x_gTD.dtype))
