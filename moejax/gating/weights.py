"""Which experts a token visits and with what weight, from its logits alone: top k."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCORES: tuple[str, ...] = ("softmax", "sigmoid")


def top_k_routing(
    logits_TE: Float[Array, "*T E"], k: int, *, score: str = "softmax", renormalize: bool = False
) -> tuple[Int[Array, "*T K"], Float[Array, "*T K"]]:
    """The k experts with the largest logits, best first, and their combine weights.

    ``score="softmax"``: weights are softmax probabilities over all E; with ``renormalize`` they are
    divided by their sum, which equals a softmax over the k kept logits (and is computed so).
    ``score="sigmoid"``: weights are sigmoids of the logits, optionally divided by their sum.
    Ties go to the lower expert id. Works on any leading axes. A weight that underflows is the
    smallest normal float32 instead, for a pair of weight 0 is not sent; that of a logit of -inf is
    0, for so an expert can be left out.

    Raises:
      ValueError: k not in [1, E], or an unknown score.
    """
    num_experts = logits_TE.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must lie in [1, num_experts={num_experts}]")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; use one of {', '.join(SCORES)}")
    logits_TE = logits_TE.astype(jnp.float32)
    top_TK, expert_TK = jax.lax.top_k(logits_TE, k)
    if score == "softmax":
        return expert_TK.astype(jnp.int32), softmax_of(top_TK, logits_TE, renormalize)
    if renormalize:
        # In logarithms, because scores that all underflow still have a share of their sum.
        weight_TK = jax.nn.softmax(jax.nn.log_sigmoid(top_TK), axis=-1)
    else:
        weight_TK = jax.nn.sigmoid(top_TK)
    return expert_TK.astype(jnp.int32), _sent(weight_TK, top_TK)


def softmax_of(chosen_TK: Array, logits_TE: Array, renormalize: bool) -> Array:
    """The weights of chosen logits: softmax over them, or over all."""
    if renormalize:
        return _sent(jax.nn.softmax(chosen_TK, axis=-1), chosen_TK)
    total_T1 = jax.nn.logsumexp(logits_TE, axis=-1, keepdims=True)
    return _sent(jnp.exp(chosen_TK - total_T1), chosen_TK)


def _sent(weight_TK: Array, chosen_TK: Array) -> Array:
    """Weights above 0, the mark of a pair, except where the logit forbids the expert."""
    return jnp.where(chosen_TK == -jnp.inf, weight_TK, at_least_tiny(weight_TK))


def at_least_tiny(weight: Array) -> Array:
    """Weights of pairs that are to be sent: one that underflows to 0 would mean, not sent."""
    return jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
