r"""Entropic optimal transport between tokens and experts, in the log domain (S-BASE)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.kernels.vma import varying_like


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

    It ends on the row update: rows are exact, columns are at convergence. Invalid tokens have a row
    of zeros, and T counts valid tokens only. See ``sinkhorn_bias`` for the other arguments.
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
    r"""What Sinkhorn's algorithm comes down to: one additive bias per expert, of mean 0.

    The plan is u_t v_e exp(s_te / eps). A row's factor u_t changes no comparison within the row, so

    .. math:: \operatorname{argmax}_e \Pi_{te} = \operatorname{argmax}_e (s_{te} + b_e),
       \qquad b_e = \epsilon \log v_e

    and the plan's row is softmax((s + b) / eps) / T. Eliminating u, one iteration is

    .. math:: b_e \leftarrow b_e + \epsilon \left( \log \tfrac{1}{E} -
       \log \operatorname{mean}_t \operatorname{softmax}((s_t + b) / \epsilon)_e \right)

    As epsilon goes to 0, -b goes to the dual prices of the balanced assignment.

    Args:
      scores_TE: scores; subtracting a row's maximum first keeps every exponential in range.
      epsilon: weight of the entropy, in units of the scores, above 0.
      num_iters: iterations, or their upper bound when ``tol`` is given.
      tol: stop when no column sum is further than this share from 1/E.
      valid_T: tokens that take part; default all.
    """
    tokens, num_experts = scores_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid_T is None else valid_T
    scaled_TE = lax.stop_gradient(scores_TE).astype(jnp.float32) / epsilon
    scaled_TE -= jnp.max(scaled_TE, axis=1, keepdims=True)
    log_count = jnp.log(jnp.maximum(jnp.sum(valid_T), 1).astype(jnp.float32))

    def log_excess(log_v_E: Array) -> Array:
        """log(E * column sum): 0 where a column has its share."""
        log_row_TE = jax.nn.log_softmax(scaled_TE + log_v_E, axis=1)
        log_row_TE = jnp.where(valid_T[:, None], log_row_TE, -jnp.inf)
        log_column_E = jax.nn.logsumexp(log_row_TE, axis=0) - log_count + jnp.log(num_experts)
        return jnp.where(jnp.any(valid_T), log_column_E, 0.0)

    def one(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        log_v_E, excess_E, turn = carry
        log_v_E = log_v_E - excess_E
        return log_v_E, log_excess(log_v_E), turn + 1

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        _, excess_E, turn = carry
        busy = turn < num_iters
        return busy if tol is None else busy & (jnp.max(jnp.abs(jnp.expm1(excess_E))) > tol)

    zero_E = jnp.zeros(num_experts, jnp.float32)
    start = varying_like((zero_E, log_excess(zero_E), jnp.int32(0)), scaled_TE)
    log_v_E, _, _ = lax.while_loop(go_on, one, start)
    bias_E = epsilon * log_v_E
    return bias_E - jnp.mean(bias_E)
