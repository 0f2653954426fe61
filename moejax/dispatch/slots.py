"""Soft MoE: the experts work on slots, weighted means of a group's tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import experts
from moejax.dispatch import exchange
from moejax.kernels.support import vary_over, varying_axes
from moejax.types import ExpertWeights, Site, Slots


def mix_slots(
    x_gTD: Float[Array, "g T D"],
    mixing: Slots,
    weights: ExpertWeights,
    activation: str,
    site: Site,
) -> Float[Array, "g T D"]:
    """y = combine f(dispatch^T x), one all-to-all each way.

    Slots are cells that are always full, so this is ``Cells`` without a plan. Sums over
    a split F, forward and backward, are of slots: the two products with weights then need none.
    """
    groups, _, width = x_gTD.shape
    own, slots = len(weights.up_EDF), mixing.dispatch_GTX.shape[-1]
    with jax.named_scope("pack"):
        mixed_gXD = jnp.einsum("gtd,gtx->gxd", x_gTD, mixing.dispatch_GTX.astype(x_gTD.dtype))
        # Slots by owner first: [S, e, g * P, D].
        by_owner = mixed_gXD.reshape(groups, site.shards, own, -1, width)
        cells_SXD = by_owner.transpose(1, 2, 0, 3, 4).reshape(site.shards, -1, width)
    received_SXD = exchange.swap_shards(cells_SXD, site)
    # Declared here, or every matmul of the experts would have a sum of its own in the backward.
    received_SXD = vary_over(received_SXD, varying_axes(*jax.tree.leaves(weights)))
    with jax.named_scope("experts"):
        cells_SeCD = received_SXD.reshape(site.shards, own, -1, width)
        out_SeCD = experts.ffn_cells(weights, cells_SeCD, activation)
    out_SXD = exchange.sum_over_tensor(out_SeCD.reshape(cells_SXD.shape), site)
    back_SXD = exchange.swap_shards(out_SXD, site)
    with jax.named_scope("unpack"):
        by_group = back_SXD.reshape(site.shards, own, groups, -1, width).transpose(2, 0, 1, 3, 4)
        out_gXD = by_group.reshape(groups, slots, width)
        return jnp.einsum("gxd,gtx->gtd", out_gXD, mixing.combine_GTX.astype(x_gTD.dtype))
