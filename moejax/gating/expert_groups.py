"""Experts in groups of equal size, such as those that lie on one device or node."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.gating.ops import has_pair
from moejax.types import GateContext, Routing

GROUP_SCORES: tuple[str, ...] = ("top2", "max")


def limit_groups(
    score_TE: Float[Array, "*T E"], num_groups: int, top_groups: int, group_score: str = "top2"
) -> Float[Array, "*T E"]:
    """The scores, -inf for experts outside the ``top_groups`` best groups of a token.

    A group is worth the sum of its two best scores ("top2") or its best one ("max"). Ties go to
    the group of lower ids. Not 0 but -inf: scores with a bias may be negative.
    """
    shape = score_TE.shape
    apart = score_TE.reshape(*shape[:-1], num_groups, -1)
    counted = min(2 if group_score == "top2" else 1, apart.shape[-1])
    worth = jnp.sum(jax.lax.top_k(apart, counted)[0], axis=-1)
    _, chosen = jax.lax.top_k(worth, top_groups)
    allowed = jnp.any(chosen[..., None] == jnp.arange(num_groups), axis=-2)
    return jnp.where(allowed[..., None], apart, -jnp.inf).reshape(shape)


def group_balance(
    routing: Routing, probs_GTE: Float[Array, "G T E"], context: GateContext, num_groups: int
) -> Float[Array, ""]:
    r"""Switch's balance loss over groups of experts, 1 when all groups are used alike.

    .. math:: L = D \sum_d \Big( \sum_{e \in d} f_e \Big) \Big( \sum_{e \in d} P_e \Big)

    with f_e the share of e in the pairs of a sequence and P_e its mean probability there; the mean
    over sequences is weighted by their valid tokens. Groups of one expert give the usual loss. The
    gradient flows through P only.
    """
    num_experts, valid_GT1 = probs_GTE.shape[-1], context.valid_GT[..., None]

    def by_sequence(value_GTE: Array) -> Array:
        """Summed over a sequence's tokens and over the experts of a group."""
        value_QUE = value_GTE.reshape(context.row_GR.size, -1, num_experts)
        value_QE = jnp.sum(value_QUE.astype(jnp.float32), axis=1)
        return jnp.sum(value_QE.reshape(len(value_QE), num_groups, -1), axis=-1)

    load_Qd = by_sequence(has_pair(routing, num_experts))
    share_Qd = load_Qd / jnp.maximum(jnp.sum(load_Qd, axis=-1, keepdims=True), 1.0)
    # Summed, not averaged: a sequence's loss is weighted by its tokens.
    mass_Qd = by_sequence(jnp.where(valid_GT1, probs_GTE, 0.0))
    total = num_groups * jnp.sum(jax.lax.stop_gradient(share_Qd) * mass_Qd)
    return total / jnp.maximum(jnp.sum(context.valid_GT, dtype=jnp.float32), 1.0)


def check_groups(k: int, num_experts: int, num_groups: int, top_groups: int) -> None:
    """Raises ValueError unless k experts fit in ``top_groups`` of ``num_groups`` equal groups."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"gate.num_groups={num_groups} does not divide num_experts={num_experts}; use a "
            "divisor, or gate.num_groups=1 for no groups"
        )
    if not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"gate.top_groups={top_groups} must lie between 1 and gate.num_groups={num_groups}"
        )
    if k > top_groups * (num_experts // num_groups):
        raise ValueError(
            f"gate.k={k} experts do not fit in gate.top_groups={top_groups} groups of "
            f"{num_experts // num_groups} (num_experts={num_experts}, gate.num_groups="
            f"{num_groups}); lower gate.k, or raise num_experts or gate.top_groups"
        )
