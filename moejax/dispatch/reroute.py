"""Overflow goes to the next-best expert with room, instead of being dropped."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.dispatch.pack import plan_cells
from moejax.types import Priority


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
    Who had room keeps it; a pair that never finds any stays as it was (and will be dropped).

    As "No-Token-Left-Behind" in Fedus, Zoph, Shazeer, arXiv 2101.03961, appendix B.
    """
    groups, tokens, columns = expert_GTK.shape
    num_experts = prob_GTE.shape[-1]
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
    back_GT = jnp.argsort(order_GT, axis=-1)
    hit_GTKE = expert_GTK[..., None] == jnp.arange(num_experts)
    visited_GTE = jnp.any(hit_GTKE & active_GTK[..., None], axis=2)
    load_GE = jnp.sum(hit_GTKE & kept_GTK[..., None], axis=(1, 2))

    def move(carry: tuple[Array, ...], column: int) -> tuple[Array, ...]:
        expert_GTK, weight_GTK, lost_GTK, visited_GTE, load_GE = carry
        allowed_GTE = ~visited_GTE & (load_GE < capacity)[:, None] & (prob_GTE > 0)
        best_GT = jnp.argmax(jnp.where(allowed_GTE, prob_GTE, -1.0), axis=-1).astype(jnp.int32)
        asks_GT = lost_GTK[..., column] & jnp.any(allowed_GTE, axis=-1)
        asks_GTE = asks_GT[..., None] & (best_GT[..., None] == jnp.arange(num_experts))
        in_order_GTE = jnp.take_along_axis(asks_GTE, order_GT[..., None], axis=1)
        before_GTE = jnp.cumsum(in_order_GTE, axis=1) - in_order_GTE
        before_GTE = jnp.take_along_axis(before_GTE, back_GT[..., None], axis=1)
        moves_GTE = asks_GTE & (load_GE[:, None] + before_GTE < capacity)
        moves_GT = jnp.any(moves_GTE, axis=-1)

        def prob(expert_GT: Array) -> Array:
            return jnp.take_along_axis(prob_GTE, expert_GT[..., None], axis=-1)[..., 0]

        old_GT = expert_GTK[..., column]
        scale_GT = prob(best_GT) / jnp.maximum(prob(old_GT), jnp.finfo(jnp.float32).tiny)
        scaled_GT = jnp.maximum(weight_GTK[..., column] * scale_GT, jnp.finfo(jnp.float32).tiny)
        return (
            expert_GTK.at[..., column].set(jnp.where(moves_GT, best_GT, old_GT)),
            weight_GTK.at[..., column].set(jnp.where(moves_GT, scaled_GT, weight_GTK[..., column])),
            lost_GTK.at[..., column].set(lost_GTK[..., column] & ~moves_GT),
            visited_GTE | moves_GTE,
            load_GE + jnp.sum(moves_GTE, axis=1),
        )

    carry = (expert_GTK, weight_GTK, active_GTK & ~kept_GTK, visited_GTE, load_GE)

    def one_round(_: Array | int, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        for column in range(columns):
            carry = move(carry, column)
        return carry

    carry = jax.lax.fori_loop(0, min(rounds, num_experts - 1), one_round, carry, unroll=True)
    return carry[0], carry[1]
