r"""Balanced linear assignment: equally many tokens per expert, at the highest total score.

The problem of BASE layers (Lewis et al., arXiv 2103.16716). With q = floor(T / E) and r = T mod E,

.. math:: \max_a \sum_t s_{t, a_t} \quad
   \text{s.t. every expert has } q \text{ or } q + 1 \text{ tokens}

This is a transportation problem whose dual has only one variable per expert: a price p_e, at which
each token goes to argmax_e (s_te - p_e). The solver therefore works on E prices and on a graph of E
nodes, in two phases, both inside ``jit`` and both in integers:

1. *Prices.* In each of a fixed number of rounds all experts set their price between the margins of
   their C-th and (C+1)-th token at the same time (bisection; no sort). Each score has a
   pseudo-random offset that shrinks from round to round, so that equal tokens do not move as one
   and the prices of several experts can move together.
2. *Exchange.* Starting from each token's best expert at these prices, tokens move along shortest
   paths of the residual graph from experts with too many to experts with too few, in bulk where
   tokens tie (`moejax.gating.solvers.flow`). The assignment stays optimal for its own counts, so
   the final one is optimal. Good prices leave little to do.

Scores are converted to multiples of 2^-29 of the largest difference within a row, which is finer
than float32. The rest is integer arithmetic: no rounding, no tolerance, and the same result on
every platform and mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.gating.solvers.flow import Flow, exchange, potentials, scatter_hash
from moejax.kernels.support import resolve_platform, varying_like
from moejax.mesh import group_local

SCALE = 2**29
"""The largest difference of scores within a row, in integer units. Scores lie in [-SCALE, 0] and
prices in [0, SCALE], so that no difference of two reduced scores overflows int32."""

PRICE_ROUNDS = 20
BISECTIONS = 5
FIRST_STEP = 0.25
SHRINK = 0.6
OFFSET_OVER_STEP = 2.0
"""Phase 1 moves prices by at most ``step``, which starts at FIRST_STEP of the scores' spread and
shrinks by SHRINK per round. The values give the fewest exchange rounds over ten kinds of scores
(T = 4096, E = 64: 4 on normal scores, at most 45 with duplicates, 236 on scores of rank one)."""


class BalancedAssignment(NamedTuple):
    """An assignment with its certificate of optimality."""

    expert_T: Int[Array, "T"]
    """The expert of each token; -1 for invalid tokens."""
    price_E: Float[Array, "E"]
    """Dual prices, in units of the scores: each token has argmax_e (score - price), up to ties."""
    gap: Float[Array, ""]
    """Dual minus primal objective, in total: an upper bound on the gain of a better assignment. At
    least 0, and nonzero only by rounding of the float32 prices."""


def balanced_assignment(
    scores_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"] | None = None
) -> BalancedAssignment:
    """The balanced assignment of tokens to experts with the largest total score.

    Args:
      scores_TE: any float dtype, any scale. NaN and -inf count as the lowest finite score, +inf as
        the highest. Adding a constant to a row or to a column changes no assignment.
      valid_T: tokens to assign; default all.

    Returns:
      Counts of valid tokens differ by at most one between experts, for every T and E. The spread of
      equal tokens depends on their positions only.

    Deterministic; at most T + E exchange rounds; not differentiable (piecewise constant). Batch it
    with ``jax.vmap``.
    """
    return solve(scores_TE, valid_T)[0]


def balanced_assignments(
    scores_GTE: Float[Array, "G T E"], valid_GT: Bool[Array, "G T"]
) -> BalancedAssignment:
    """``balanced_assignment`` of every group, on the group's own device.

    The solver loops until it is done, so a batch takes as long as its slowest group. On CPU groups
    run one after the other instead: none waits for another, and its arrays stay in the cache.
    Checkpointed as "routing", so that rematerialisation does not solve again.
    """
    run = jax.vmap(balanced_assignment)
    if resolve_platform(None) == "cpu":
        run = lambda *groups: lax.map(lambda group: balanced_assignment(*group), groups)
    return checkpoint_name(group_local(run)(scores_GTE, valid_GT), "routing")


def solve(
    scores_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"] | None = None
) -> tuple[BalancedAssignment, Int[Array, ""]]:
    """``balanced_assignment`` and the number of exchange rounds."""
    tokens, num_experts = scores_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid_T is None else valid_T
    scores_TE = finite(lax.stop_gradient(scores_TE).astype(jnp.float32))
    value_TE, unit = fixed_point(scores_TE, valid_T)
    count = jnp.sum(valid_T, dtype=jnp.int32)
    share, left_over = count // num_experts, count % num_experts

    price_E = starting_prices(value_TE, valid_T, count.astype(jnp.float32) / num_experts)
    expert_T = jnp.where(valid_T, jnp.argmax(value_TE - price_E, axis=1), -1).astype(jnp.int32)
    # The experts with the highest prices take one more token, which is optimal at given prices.
    extra_E = _descending_rank(price_E) < left_over
    start = Flow(expert_T, extra_E)
    flow, rounds = exchange(value_TE, start, share, left_over)
    price_E = potentials(value_TE, flow, left_over) * unit
    gap = _gap(scores_TE, valid_T, price_E, flow, left_over)
    return BalancedAssignment(flow.expert_T, price_E, gap), rounds


def finite(scores_TE: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """NaN and -inf become the lowest finite score, +inf the highest; all 0 if none is finite."""
    is_finite = jnp.isfinite(scores_TE)
    low = jnp.min(scores_TE, initial=jnp.inf, where=is_finite)
    high = jnp.max(scores_TE, initial=-jnp.inf, where=is_finite)
    any_finite = jnp.any(is_finite)
    replaced = jnp.where(scores_TE == jnp.inf, high, low)
    return jnp.where(is_finite, scores_TE, jnp.where(any_finite, replaced, 0.0))


def fixed_point(
    scores_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]
) -> tuple[Int[Array, "T E"], Float[Array, ""]]:
    """Scores below their row's best, in [-SCALE, 0], and the size of one unit. 0 where invalid."""
    below_TE = scores_TE - jnp.max(scores_TE, axis=1, keepdims=True)
    below_TE = jnp.where(valid_T[:, None], below_TE, 0.0)
    spread = -jnp.min(below_TE, initial=0.0)
    unit = jnp.where(spread > 0, spread, 1.0)
    return jnp.round(below_TE / unit * SCALE).astype(jnp.int32), unit / SCALE


def starting_prices(
    value_TE: Int[Array, "T E"], valid_T: Bool[Array, "T"], target: Float[Array, ""]
) -> Int[Array, "E"]:
    """Prices in [0, SCALE] at which about ``target`` tokens prefer each expert."""
    tokens, num_experts = value_TE.shape
    # Experts lead, so that maxima over them, most of the work, run over whole vectors of tokens.
    value_ET = value_TE.T
    hash_TE = scatter_hash(tokens, num_experts, 0)
    offset_ET = ((hash_TE >> 16).astype(jnp.float32) / 2**16).T
    # A margin below every price, so that invalid tokens count for no expert.
    never = -2 * SCALE

    def one_round(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, price_E, step = carry
        moved_ET = value_ET - (offset_ET * (OFFSET_OVER_STEP * step)).astype(jnp.int32)
        reduced_ET = moved_ET - price_E[:, None]
        best_T = jnp.max(reduced_ET, axis=0)
        is_best_ET = reduced_ET == best_T  # an argmax is many times slower on CPU
        others_ET = jnp.where(is_best_ET, -3 * SCALE, reduced_ET)
        tied_T = jnp.sum(is_best_ET, axis=0) > 1
        second_T = jnp.where(tied_T, best_T, jnp.max(others_ET, axis=0))
        # The highest price at which a token would choose an expert, at the others' prices.
        margin_ET = moved_ET - jnp.where(is_best_ET, second_T, best_T)
        margin_ET = jnp.where(valid_T, margin_ET, never)

        def bisect(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low_E, high_E = bounds
            middle_E = (low_E + high_E) // 2
            bids_E = jnp.sum(margin_ET >= middle_E[:, None], axis=1, dtype=jnp.int32)
            too_many_E = bids_E.astype(jnp.float32) > target
            return jnp.where(too_many_E, middle_E, low_E), jnp.where(too_many_E, high_E, middle_E)

        whole_step = step.astype(jnp.int32)
        bounds = lax.fori_loop(0, BISECTIONS, bisect, (price_E - whole_step, price_E + whole_step))
        price_E = (bounds[0] + bounds[1]) // 2
        return turn + 1, jnp.clip(price_E - jnp.min(price_E), 0, SCALE), step * SHRINK

    spread = -jnp.min(value_TE, initial=0).astype(jnp.float32)
    start = (jnp.int32(0), jnp.zeros(num_experts, jnp.int32), FIRST_STEP * spread)
    start = varying_like(start, value_TE)
    # Without any spread all experts are equal, and no price is needed.
    return lax.while_loop(lambda c: (c[0] < PRICE_ROUNDS) & (c[2] >= 1.0), one_round, start)[1]


def _descending_rank(price_E: Array) -> Int[Array, "E"]:
    """Rank of each expert by price, highest first; ties to the lower id."""
    higher_EE = price_E[None, :] > price_E[:, None]
    column_E = jnp.arange(price_E.size)
    tied_before_EE = (price_E[None, :] == price_E[:, None]) & (column_E < column_E[:, None])
    return jnp.sum(higher_EE | tied_before_EE, axis=1)


def _gap(
    scores_TE: Array, valid_T: Array, price_E: Array, flow: Flow, left_over: Array
) -> Float[Array, ""]:
    """Dual minus primal objective, as a sum of terms that are each at least 0.

    A token's term is its loss against its best expert at these prices. An expert's term is the cost
    of wrongly having or lacking an extra token, against the price of the last expert with one.
    """
    net_TE = scores_TE - price_E
    own_T = jnp.take_along_axis(net_TE, jnp.maximum(flow.expert_T, 0)[:, None], axis=1)[:, 0]
    # Not below 0 even where the compiler rounds the two differently (fused multiply-add).
    regret_T = jnp.maximum(jnp.max(net_TE, axis=1) - own_T, 0.0)
    regret = jnp.sum(jnp.where(valid_T, regret_T, 0.0))
    is_last_E = _descending_rank(price_E) == left_over - 1
    last_price = jnp.sum(jnp.where(is_last_E, price_E, 0.0))
    above_E = price_E - last_price
    wrong_E = jnp.where(flow.extra_E, jnp.maximum(-above_E, 0.0), jnp.maximum(above_E, 0.0))
    return regret + jnp.where(left_over > 0, jnp.sum(wrong_E), 0.0)
