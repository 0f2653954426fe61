"""Overflow goes to the next-best expert with room, instead of being dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.dispatch.pack import plan_cells
from moejax.types import Priority


class _Moved(NamedTuple):
    """A routing between two rounds: its pairs without room, and the load of the experts."""

    expert_GTK: Int[Array, "G T K"]
    weight_GTK: Float[Array, "G T K"]
    lost_GTK: Bool[Array, "G T K"]
    visited_GTE: Bool[Array, "G T E"]
    load_GE: Int[Array, "G E"]


def reroute(
    expert_GTK: Int[Array, "G T K"],
    weight_GTK: Float[Array, "G T K"],
    prob_GTE: Float[Array, "G T E"],
    score_GT: Float[Array, "G T"],
    *,
    capacity: int,
    priority: Priority,
    rounds: int,
) -> tuple[Int[Array, "G T K"], Float[Array, "G T K"]]:
    r"""A routing in which pairs that found no room have moved, where any expert had some.

    In each of ``rounds`` rounds every pair without room asks for one more expert: the most probable
    one that the token does not visit yet, that was not too full before the round, and whose
    probability is above 0. Room is given out column by column, tokens in the order of ``priority``.
    A pair that moved from expert e to j weighs w p_j / p_e: for Switch's weights p_e that is p_j.
    Pairs that had room keep it; a pair that never finds any stays as it was (and will be dropped).

    As "No-Token-Left-Behind" in Fedus, Zoph, Shazeer, arXiv 2101.03961, appendix B.
    """
    (groups, tokens, columns), num_experts = expert_GTK.shape, prob_GTE.shape[-1]
    kept_GTK = plan_cells(
        expert_GTK,
        weight_GTK,
        score_GT,
        num_experts=num_experts,
        capacity=capacity,
        priority=priority,
    ).kept_tK.reshape(expert_GTK.shape)
    active_GTK = weight_GTK > 0
    order_GT = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
    if priority in ("gate", "random"):
        order_GT = jnp.argsort(-score_GT, axis=-1, stable=True)
    hit_GTKE = expert_GTK[..., None] == jnp.arange(num_experts)
    moved = _Moved(
        expert_GTK,
        weight_GTK,
        lost_GTK=active_GTK & ~kept_GTK,
        visited_GTE=jnp.any(hit_GTKE & active_GTK[..., None], axis=2),
        load_GE=jnp.sum(hit_GTKE & kept_GTK[..., None], axis=(1, 2), dtype=jnp.int32),
    )

    def one_round(_: Array | int, moved: _Moved) -> _Moved:
        for column in range(columns):
            moved = _move(moved, column, prob_GTE, order_GT, capacity)
        return moved

    moved = jax.lax.fori_loop(0, min(rounds, num_experts - 1), one_round, moved, unroll=True)
    return moved.expert_GTK, moved.weight_GTK


def _move(moved: _Moved, column: int, prob_GTE: Array, order_GT: Array, capacity: int) -> _Moved:
    """One column's pairs without room ask for their next expert, tokens in the given order."""
    num_experts = prob_GTE.shape[-1]
    room_GE = moved.load_GE < capacity
    allowed_GTE = ~moved.visited_GTE & room_GE[:, None] & (prob_GTE > 0)
    best_GT = jnp.argmax(jnp.where(allowed_GTE, prob_GTE, -1.0), axis=-1).astype(jnp.int32)
    asks_GT = moved.lost_GTK[..., column] & jnp.any(allowed_GTE, axis=-1)
    asks_GTE = asks_GT[..., None] & (best_GT[..., None] == jnp.arange(num_experts))
    in_order_GTE = jnp.take_along_axis(asks_GTE, order_GT[..., None], axis=1)
    before_GTE = jnp.cumsum(in_order_GTE, axis=1, dtype=jnp.int32) - in_order_GTE.astype(jnp.int32)
    back_GT = jnp.argsort(order_GT, axis=-1)
    before_GTE = jnp.take_along_axis(before_GTE, back_GT[..., None], axis=1)
    moves_GTE = asks_GTE & (moved.load_GE[:, None] + before_GTE < capacity)
    moves_GT = jnp.any(moves_GTE, axis=-1)

    def prob(expert_GT: Array) -> Array:
        return jnp.take_along_axis(prob_GTE, expert_GT[..., None], axis=-1)[..., 0]

    old_GT, weight_GT = moved.expert_GTK[..., column], moved.weight_GTK[..., column]
    tiny = jnp.finfo(jnp.float32).tiny
    scaled_GT = weight_GT * (prob(best_GT) / jnp.maximum(prob(old_GT), tiny))
    # A weight that underflows to 0 would mean: not sent.
    new_weight_GT = jnp.where(moves_GT, jnp.maximum(scaled_GT, tiny), weight_GT)
    new_expert_GT = jnp.where(moves_GT, best_GT, old_GT)
    return _Moved(
        moved.expert_GTK.at[..., column].set(new_expert_GT),
        moved.weight_GTK.at[..., column].set(new_weight_GT),
        moved.lost_GTK.at[..., column].set(moved.lost_GTK[..., column] & ~moves_GT),
        moved.visited_GTE | moves_GTE,
        moved.load_GE + jnp.sum(moves_GTE, axis=1),
    )
