"""Packing tokens into rows and back: index plans, and the two gathers that follow them.

A plan is a pair of mutually inverse maps between pairs (token, column) and rows of a buffer. With
both maps at hand every pass is a gather: forward and backward of packing and of combining contain
no scatter of activations. Everything here is local to a device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.kernels.support import match_varying
from moejax.types import Priority

_UNROLLED_COLUMNS = 8


class Plan(NamedTuple):
    """The row of each pair. Pair id p = t * K + k; t counts this device's tokens, group by group.

    ``pair_M``: the pair in each row of the buffer, t * K (one past the last) where a row is empty.
    ``row_tK``: the row of each pair, 0 where the pair has none. ``kept_tK``: whether it has one.
    """

    pair_M: Int[Array, "M"]
    row_tK: Int[Array, "t K"]
    kept_tK: Bool[Array, "t K"]


def serving_order(
    priority: Priority, score_gT: Float[Array, "g T"], columns: int
) -> Int[Array, "g N"]:
    """The pairs (t * K + k) of each group in the order in which they ask for room.

    ``position``: token by token, each with all its choices. ``choice``: all first choices by
    position, then all second choices, ... ``gate``: as choice, but tokens by descending score, ties
    by position (batch-prioritised routing, Riquelme et al., arXiv 2106.05974). ``random``: token by
    token, tokens by descending (random) score.
    """
    groups, tokens = score_gT.shape
    token_gT = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
    if priority in ("gate", "random"):
        token_gT = jnp.argsort(-score_gT, axis=-1, stable=True)
    column_K = jnp.arange(columns)
    if priority in ("position", "random"):
        pair = token_gT[:, :, None] * columns + column_K
    else:
        pair = token_gT[:, None, :] * columns + column_K[:, None]
    return pair.reshape(groups, tokens * columns)


def plan_cells(
    expert_gTK: Int[Array, "g T K"],
    weight_gTK: Float[Array, "g T K"],
    score_gT: Float[Array, "g T"],
    *,
    num_experts: int,
    capacity: int,
    priority: Priority,
) -> Plan:
    """Rows [E, g, C]: each expert has C slots per group, given out in serving order."""
    groups, tokens, columns = expert_gTK.shape
    pairs = tokens * columns
    expert_gN = jnp.where(weight_gTK > 0, expert_gTK, num_experts).reshape(groups, pairs)
    if priority == "position":  # pairs are served as they are numbered
        sorted_expert_gN, sorted_pair_gN = _stable_sort(expert_gN, num_experts)
    else:
        served_gN = serving_order(priority, score_gT, columns)
        in_order_gN = jnp.take_along_axis(expert_gN, served_gN, axis=1)
        sorted_expert_gN, by_expert_gN = _stable_sort(in_order_gN, num_experts)
        sorted_pair_gN = jnp.take_along_axis(served_gN, by_expert_gN, axis=1)
    count_gE = jnp.sum(expert_gN[:, None, :] == jnp.arange(num_experts)[:, None], axis=-1)
    start_gE = jnp.cumsum(count_gE, axis=1) - count_gE

    slot_C = jnp.arange(capacity)
    index_gEC = jnp.minimum(start_gE[..., None] + slot_C, pairs - 1)
    pair_gEC = jnp.take_along_axis(sorted_pair_gN[:, None, :], index_gEC, axis=2)
    group_g11 = jnp.arange(groups)[:, None, None]
    filled_gEC = slot_C < count_gE[..., None]
    pair_gEC = jnp.where(filled_gEC, pair_gEC + group_g11 * pairs, groups * pairs)

    start_gE1 = jnp.pad(start_gE, ((0, 0), (0, 1)))
    rank_sorted_gN = jnp.arange(pairs) - jnp.take_along_axis(start_gE1, sorted_expert_gN, axis=1)
    rank_gN = jax.vmap(_inverse)(sorted_pair_gN, rank_sorted_gN)
    kept_gN = (expert_gN < num_experts) & (rank_gN < capacity)
    row_gN = (expert_gN * groups + jnp.arange(groups)[:, None]) * capacity + rank_gN
    plan = Plan(
        pair_M=jnp.swapaxes(pair_gEC, 0, 1).reshape(-1),
        row_tK=jnp.where(kept_gN, row_gN, 0).reshape(groups * tokens, columns),
        kept_tK=kept_gN.reshape(groups * tokens, columns),
    )
    return checkpoint_name(plan, "routing")


def plan_sorted(
    expert_tK: Int[Array, "t K"], weight_tK: Float[Array, "t K"], *, num_experts: int, rows: int
) -> tuple[Plan, Int[Array, "E"]]:
    """Rows sorted by expert, then by pair, inactive pairs nowhere; and how many each expert has.

    Experts outside [0, num_experts) count as inactive. ``rows`` must be at least the number of
    active pairs; rows past that number are empty.
    """
    tokens, columns = expert_tK.shape
    active_tK = (weight_tK > 0) & (expert_tK >= 0) & (expert_tK < num_experts)
    expert_N = jnp.where(active_tK, expert_tK, num_experts).reshape(-1)
    _, order_N = _stable_sort(expert_N, num_experts)
    size_E = jnp.sum(expert_N[None, :] == jnp.arange(num_experts)[:, None], axis=-1)
    row_N = _inverse(order_N, jnp.arange(expert_N.size))
    pair_M = jnp.where(jnp.arange(rows) < jnp.sum(size_E), order_N[:rows], expert_N.size)
    row_tK = jnp.where(active_tK, row_N.reshape(tokens, columns), 0)
    plan = Plan(pair_M, row_tK, active_tK), size_E.astype(jnp.int32)
    return checkpoint_name(plan, "routing")


def plan_visits(
    expert_tK: Int[Array, "t K"], weight_tK: Float[Array, "t K"], *, shards: int, own: int
) -> tuple[Plan, Int[Array, "S"]]:
    """Rows sorted by shard, one for each shard on which a token has active pairs; and their counts.

    A shard has ``own`` experts. The first of a token's pairs on a shard stands for all.
    """
    tokens, columns = expert_tK.shape
    shard_tK = jnp.where(weight_tK > 0, expert_tK // own, shards)
    same_tKK = shard_tK[:, :, None] == shard_tK[:, None, :]
    again_tK = jnp.any(same_tKK & jnp.tri(columns, k=-1, dtype=bool), axis=-1)
    first_tK = jnp.where(again_tK, 0.0, jax.lax.stop_gradient(weight_tK))
    rows = tokens * min(columns, shards)
    return plan_sorted(shard_tK, first_tK, num_experts=shards, rows=rows)


def _stable_sort(expert_N: Array, num_experts: int) -> tuple[Array, Array]:
    """Sorted experts (at most ``num_experts``) and where each was before, along the last axis.

    As one key, expert and place sort five times faster on CPU than an argsort.
    """
    pairs = expert_N.shape[-1]
    if (num_experts + 1) * pairs > jnp.iinfo(jnp.int32).max:
        order_N = jnp.argsort(expert_N, axis=-1, stable=True)
        return jnp.take_along_axis(expert_N, order_N, axis=-1), order_N
    key_N = jnp.sort(expert_N.astype(jnp.int32) * pairs + jnp.arange(pairs, dtype=jnp.int32))
    return key_N // pairs, key_N % pairs


def _inverse(index_N: Array, value_N: Array) -> Array:
    """``out[index[i]] = value[i]`` for a permutation ``index``."""
    return jnp.zeros_like(value_N).at[index_N].set(value_N, unique_indices=True)


def _gather(x_tD: Array, plan: Plan) -> Array:
    columns = plan.row_tK.shape[1]
    # A padding row instead of a select over the result: the copy is of t rows, not of M.
    padded = jnp.concatenate([x_tD, jnp.zeros_like(x_tD[:1])])
    return jnp.take(padded, plan.pair_M // columns, axis=0, mode="clip")


def _sum(rows_MD: Array, plan: Plan) -> Array:
    def row_of(column: Array | int) -> Array:
        return _rows_of_column(rows_MD, plan, column)

    return _sum_over_columns(row_of, plan).astype(rows_MD.dtype)


# Backward passes call the plain functions, so that forward mode may pass them: jvp of grad.
@jax.custom_vjp
def gather_rows(x_tD: Float[Array, "t D"], plan: Plan) -> Float[Array, "M D"]:
    """The token of each row; zeros where a row is empty."""
    return _gather(x_tD, plan)


def _gather_rows_fwd(x_tD: Array, plan: Plan) -> tuple[Array, Plan]:
    return _gather(x_tD, plan), plan


def _gather_rows_bwd(plan: Plan, grad_MD: Array) -> tuple[Array, None]:
    return _sum(grad_MD, plan), None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


@jax.custom_vjp
def sum_rows(rows_MD: Float[Array, "M D"], plan: Plan) -> Float[Array, "t D"]:
    """The sum of each token's rows, accumulated in float32: the transpose of ``gather_rows``."""
    return _sum(rows_MD, plan)


def _sum_rows_fwd(rows_MD: Array, plan: Plan) -> tuple[Array, Plan]:
    return _sum(rows_MD, plan), plan


def _sum_rows_bwd(plan: Plan, grad_tD: Array) -> tuple[Array, None]:
    return _gather(grad_tD, plan), None


sum_rows.defvjp(_sum_rows_fwd, _sum_rows_bwd)


@jax.custom_vjp
def combine_rows(
    rows_MD: Float[Array, "M D"], weight_tK: Float[Array, "t K"], plan: Plan
) -> Float[Array, "t D"]:
    """y_t = sum over kept columns of weight_tk rows[row_tk], accumulated in float32."""
    return _combine(rows_MD, weight_tK, plan)


def _combine(rows_MD: Array, weight_tK: Array, plan: Plan) -> Array:
    def weighted(column: Array | int) -> Array:
        return weight_tK[:, column, None] * _rows_of_column(rows_MD, plan, column)

    return _sum_over_columns(weighted, plan).astype(rows_MD.dtype)


def _rows_of_column(rows_MD: Array, plan: Plan, column: Array | int) -> Float[Array, "t D"]:
    """The row of each token's pair in one column, in float32; zeros where it has none."""
    rows_tD = jnp.take(rows_MD, plan.row_tK[:, column], axis=0, mode="clip").astype(jnp.float32)
    # A select, not a product with 0: rows that belong to no pair may hold anything.
    return jnp.where(plan.kept_tK[:, column, None], rows_tD, 0.0)


def _sum_over_columns(of_column: Callable[[Array | int], Array], plan: Plan) -> Array:
    """Sums [t, D] arrays column by column.

    XLA:CPU takes ten times as long to reduce one gathered [t, K, D] array.
    """
    columns = plan.row_tK.shape[1]
    return jax.lax.fori_loop(
        1,
        columns,
        lambda column, total: total + of_column(column),
        of_column(0),
        unroll=columns <= _UNROLLED_COLUMNS,
    )


def _combine_rows_fwd(
    rows_MD: Array, weight_tK: Array, plan: Plan
) -> tuple[Array, tuple[Array, Array, Plan]]:
    return _combine(rows_MD, weight_tK, plan), (rows_MD, weight_tK, plan)


def _combine_rows_bwd(
    saved: tuple[Array, Array, Plan], grad_tD: Array
) -> tuple[Array, Array, None]:
    rows_MD, weight_tK, plan = saved
    columns = weight_tK.shape[1]
    weight_N = jnp.where(plan.kept_tK, weight_tK, 0.0).reshape(-1)
    weight_N = jnp.concatenate([weight_N, jnp.zeros_like(weight_N[:1])])
    weight_M = jnp.take(weight_N, plan.pair_M, mode="clip")
    grad_MD = jnp.take(grad_tD, plan.pair_M // columns, axis=0, mode="clip").astype(jnp.float32)
    grad_MD = (weight_M[:, None] * grad_MD).astype(rows_MD.dtype)

    rows_tKD = jnp.take(rows_MD, plan.row_tK, axis=0, mode="clip").astype(jnp.float32)
    dot_tK = jnp.einsum("tkd,td->tk", rows_tKD, grad_tD.astype(jnp.float32))
    return grad_MD, jnp.where(plan.kept_tK, dot_tK, 0.0), None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


@jax.named_scope("unpack")
def unpack(
    rows_MD: Float[Array, "M D"], weight_tK: Float[Array, "t K"], plan: Plan
) -> Float[Array, "t D"]:
    """``combine_rows`` as the last part of a transport, of rows that came from other devices."""
    rows_MD, weight_tK = match_varying(rows_MD, weight_tK)
    return combine_rows(rows_MD, weight_tK, plan)
