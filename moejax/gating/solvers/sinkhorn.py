"""Entropic optimal transport between tokens and experts, in the log domain (S-BASE)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.kernels.support import varying_like

MOST_DRIFT, LEAST_COLUMN = 20.0, 1e-8
"""Limits for iterations without exponentials: the change of log v since exponentials were last
computed, and the smallest sum of a column. In a row whose largest exponential is 1, the terms below
float32's range (1e-38) then miss less than T e^40 1e-38 of a column: 1e-8 of it up to 10^5 tokens.
"""


def sinkhorn_plan(
    scores_TE: Float[Array, "T E"],
    *,
    epsilon: float = 1.0,
    num_iters: int = 50,
    tol: float | None = None,
    valid_T: Bool[Array, "T"] | None = None,
) -> Float[Array, "T E"]:
    r"""The transport plan with rows summing to 1/T and columns to 1/E.

    .. math:: \max_\Pi \sum_{te} \Pi_{te} s_{te} - \epsilon \sum_{te} \Pi_{te} \log \Pi_{te}

    The last update is that of the rows: rows are exact, columns only at convergence. Invalid tokens
    have a row of zeros, and T counts valid tokens only. See ``sinkhorn_bias`` for the arguments.
    """
    tokens, num_experts = scores_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid_T is None else valid_T
    scores_TE = scores_TE.astype(jnp.float32)
    bias_E = sinkhorn_bias(
        scores_TE, epsilon=epsilon, num_iters=num_iters, tol=tol, valid_T=valid_T
    )
    share_TE = jax.nn.softmax((scores_TE + bias_E) / epsilon, axis=1)
    plan_TE = share_TE / jnp.maximum(jnp.sum(valid_T), 1)
    return jnp.where(valid_T[:, None], plan_TE, 0.0)


def sinkhorn_bias(
    scores_TE: Float[Array, "T E"],
    *,
    epsilon: float = 1.0,
    num_iters: int = 50,
    tol: float | None = None,
    valid_T: Bool[Array, "T"] | None = None,
) -> Float[Array, "E"]:
    r"""One additive bias per expert, of mean 0, equivalent to Sinkhorn's algorithm.

    The plan is u_t v_e exp(s_te / eps). The factor u_t changes no comparison within its row, so

    .. math:: \operatorname{argmax}_e \Pi_{te} = \operatorname{argmax}_e (s_{te} + b_e),
       \qquad b_e = \epsilon \log v_e

    and the plan's row is softmax((s + b) / eps) / T. Eliminating u, one iteration is

    .. math:: b_e \leftarrow b_e + \epsilon \left( \log \tfrac{1}{E} -
       \log \operatorname{mean}_t \operatorname{softmax}((s_t + b) / \epsilon)_e \right)

    As epsilon approaches 0, -b approaches the dual prices of the balanced assignment.

    Args:
      scores_TE: scores of any size; each row's maximum is subtracted first.
      epsilon: weight of the entropy, in units of the scores, above 0.
      num_iters: iterations, or their upper bound when ``tol`` is given.
      tol: stop when every column sum is within this share of 1/E.
      valid_T: tokens that take part; default all.
    """
    tokens, num_experts = scores_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid_T is None else valid_T
    scaled_TE = lax.stop_gradient(scores_TE).astype(jnp.float32) / epsilon
    scaled_TE -= jnp.max(scaled_TE, axis=1, keepdims=True)
    scaled_TE = jnp.where(valid_T[:, None], scaled_TE, 0.0)

    def busy(excess_E: Array, turn: Array) -> Array:
        more = turn < num_iters
        return more if tol is None else more & (jnp.max(jnp.abs(jnp.expm1(excess_E))) > tol)

    def one(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        log_v_E, excess_E, turn = carry
        log_v_E = log_v_E - excess_E
        excess_E = _log_excess(scaled_TE, valid_T, log_v_E)
        return _without_exponentials(scaled_TE, valid_T, (log_v_E, excess_E, turn + 1), busy)

    zero_E = jnp.zeros(num_experts, jnp.float32)
    start = (zero_E, _log_excess(scaled_TE, valid_T, zero_E), jnp.int32(0))
    start = varying_like(start, scaled_TE)
    log_v_E, _, _ = lax.while_loop(lambda carry: busy(*carry[1:]), one, start)
    bias_E = epsilon * log_v_E
    return bias_E - jnp.mean(bias_E)


def _log_excess(scaled_TE: Array, valid_T: Array, log_v_E: Array) -> Array:
    """log(E * column sum), 0 where a column has its share; in the log domain, so of any size."""
    log_row_TE = jax.nn.log_softmax(scaled_TE + log_v_E, axis=1)
    log_row_TE = jnp.where(valid_T[:, None], log_row_TE, -jnp.inf)
    log_column_E = jax.nn.logsumexp(log_row_TE, axis=0) - _log_share(valid_T, log_v_E.size)
    return jnp.where(jnp.any(valid_T), log_column_E, 0.0)


def _log_share(valid_T: Array, num_experts: int) -> Array:
    """The log of a column's sum if all columns have the same and each row sums to 1."""
    return jnp.log(jnp.maximum(jnp.sum(valid_T), 1).astype(jnp.float32) / num_experts)


def _without_exponentials(
    scaled_TE: Array,
    valid_T: Array,
    carry: tuple[Array, Array, Array],
    busy: Callable[[Array, Array], Array],
) -> tuple[Array, Array, Array]:
    """Iterations outside the log domain, two sums of products each, for as long as possible.

    ``exp(s + log v)`` is computed once; then v changes by factors. The loop ends before numbers
    could leave float32's range, and the next iteration runs in the log domain.
    """
    log_v_E, excess_E, turn = carry
    logit_TE = scaled_TE + log_v_E
    kernel_TE = jnp.exp(logit_TE - jnp.max(logit_TE, axis=1, keepdims=True))
    # Both layouts, because only sums over the leading axis are vectorised.
    kernel_ET = kernel_TE.T
    log_share = _log_share(valid_T, log_v_E.size)

    def keep_going(carry: tuple[Array, Array, Array, Array]) -> Array:
        drift_E, excess_E, turn, in_range = carry
        near = jnp.max(jnp.abs(drift_E - excess_E)) <= MOST_DRIFT
        return busy(excess_E, turn) & in_range & near

    def one(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        drift_E, excess_E, turn, _ = carry
        new_E = drift_E - excess_E
        factor_E = jnp.exp(new_E)
        row_T = jnp.sum(kernel_ET * factor_E[:, None], axis=0)
        share_T = jnp.where(valid_T, 1.0 / row_T, 0.0)
        column_E = factor_E * jnp.sum(kernel_TE * share_T[:, None], axis=0)
        in_range = jnp.all(column_E >= LEAST_COLUMN)
        excess = jnp.where(in_range, jnp.log(column_E) - log_share, excess_E)
        return (
            jnp.where(in_range, new_E, drift_E),
            excess,
            turn + in_range.astype(jnp.int32),
            in_range,
        )

    start = (jnp.zeros_like(log_v_E), excess_E, turn, jnp.bool_(True))
    drift_E, excess_E, turn, _ = lax.while_loop(keep_going, one, varying_like(start, scaled_TE))
    return log_v_E + drift_E, excess_E, turn
