"""The oracle: a mixture of experts as the formula has it, every expert on every token.

O(T E) work, no packing, no capacity, no mesh. Written to be read and used by tests only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.experts import ffn_one
from moejax.types import ExpertWeights, Routing


def moe(
    x_GTD: Float[Array, "G T D"],
    routing: Routing,
    weights: ExpertWeights,
    activation: str,
    kept_GTK: Bool[Array, "G T K"] | None = None,
) -> Float[Array, "G T D"]:
    """y_t = sum over kept columns k of w_tk f_{e_tk}(x_t)."""
    weight_GTK = routing.weight_GTK
    if kept_GTK is not None:
        weight_GTK = jnp.where(kept_GTK, weight_GTK, 0.0)
    y_GTD = jnp.zeros(x_GTD.shape, jnp.float32)
    for expert in range(weights.up_EDF.shape[0]):
        own = jax.tree.map(lambda w, e=expert: w[e], weights)
        out_GTD = ffn_one(own, x_GTD.reshape(-1, x_GTD.shape[-1]), activation).reshape(x_GTD.shape)
        weight_GT = jnp.sum(jnp.where(routing.expert_GTK == expert, weight_GTK, 0.0), axis=-1)
        y_GTD = y_GTD + weight_GT[..., None] * out_GTD
    return y_GTD.astype(x_GTD.dtype)


def kept_in_order(
    expert_TK: list[list[int]],
    weight_TK: list[list[float]],
    capacity: int,
    order: list[tuple[int, int]],
) -> list[list[bool]]:
    """A mask of the pairs of one group that find room when (t, k) pairs are served in ``order``."""
    used: dict[int, int] = {}
    kept = [[False] * len(row) for row in expert_TK]
    for t, k in order:
        if weight_TK[t][k] > 0 and used.get(expert_TK[t][k], 0) < capacity:
            used[expert_TK[t][k]] = used.get(expert_TK[t][k], 0) + 1
            kept[t][k] = True
    return kept
