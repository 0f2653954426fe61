"""Selection by experts: the best tokens of each column of a score matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def slots(tokens: int, num_experts: int, factor: float) -> int:
    """C = ceil(factor * tokens / E), at most all tokens: how many each expert takes."""
    # The subtraction keeps 1.1 * 10 at 11 although the product is 11.000000000000002.
    return min(tokens, max(1, math.ceil(factor * tokens / num_experts - 1e-9)))


def choose_tokens(
    score_TE: Float[Array, "T E"], factor: float, valid_T: Bool[Array, "T"] | None = None
) -> tuple[Bool[Array, "T E"], Float[Array, "E"]]:
    """Each expert's C best valid tokens, and the score of the last of them (0 if there are none).

    C is ``slots`` of the number of valid tokens, so padding changes nothing. Ties go to the earlier
    token; a score that is NaN comes last.
    """
    tokens, num_experts = score_TE.shape
    valid_T1 = jnp.ones((tokens, 1), bool) if valid_T is None else valid_T[:, None]
    score_TE = jnp.where(valid_T1 & ~jnp.isnan(score_TE), score_TE, -jnp.inf)
    slots_N = np.array([0, *(slots(n, num_experts, factor) for n in range(1, tokens + 1))])
    taken = jnp.asarray(slots_N, jnp.int32)[jnp.sum(valid_T1)]
    best_EC, _ = jax.lax.top_k(score_TE.T, slots_N[-1].item())
    last_E = jnp.take(best_EC, jnp.maximum(taken - 1, 0), axis=1)
    above_TE = score_TE > last_E
    level_TE = valid_T1 & (score_TE == last_E)
    room_E = taken - jnp.sum(above_TE, axis=0)
    chosen_TE = above_TE | (level_TE & (jnp.cumsum(level_TE, axis=0) <= room_E))
    return chosen_TE, jnp.where(jnp.isfinite(last_E), last_E, 0.0)
