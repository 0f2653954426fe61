"""From logits to the next token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from; the defaults take the most likely one.

    Applied in this order, each as transformers defines it:

    * ``repetition_penalty`` r: logits of tokens that the prompt or the text so far contains are
      divided by r where positive and multiplied by r where negative (arXiv 1909.05858);
    * ``temperature``: divides the logits; 0 takes the most likely token, whatever follows here;
    * ``top_k``: tokens with a logit below the k-th largest are left out (0: none);
    * ``top_p``: the most likely tokens with a probability of ``top_p`` together stay
      (arXiv 1904.09751);
    * ``min_p``: tokens less likely than ``min_p`` times the most likely one are left out
      (arXiv 2407.01082).

    Raises:
      ValueError: a value outside its range, in one line.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", self.temperature >= 0, "0 (the most likely token) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (all tokens) and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is none"),
        ):
            if not (fits and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} must be {allowed}")


def processed(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
    """The logits that tokens are drawn by; -inf for tokens that are left out.

    ``seen_BV``: the tokens of the prompt and of the text so far.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        moved_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(seen_BV, moved_BV, logits_BV)
    if not sampling.temperature:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        last_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < last_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    if sampling.min_p:
        best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        least_B1 = best_B1 + math.log(sampling.min_p)
        # The most likely token stays, whatever its difference to itself is rounded to.
        out_BV = (logits_BV < least_B1) & (logits_BV < best_B1)
        logits_BV = jnp.where(out_BV, -jnp.inf, logits_BV)
    return logits_BV


def _nucleus(logits_BV: Array, share: float) -> Array:
    """Leaves out the least likely tokens with a probability of at most 1 - ``share`` together."""
    order_BV = jnp.argsort(logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    below_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
    out_BV = (below_BV <= 1 - share).at[:, -1].set(False)
    kept_BV = jnp.where(out_BV, -jnp.inf, sorted_BV)
    place_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(kept_BV, place_BV, axis=-1)


def drawn(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    sampling: Sampling,
    seed_B: Int[Array, "B"],
    count: Int[Array, ""],
) -> Int[Array, "B"]:
    """The next token of each text, which has ``count`` of them already.

    A draw depends on the text's own seed, on ``count`` and on its logits, so that a text is the
    same in every batch.
    """
    logits_BV = processed(logits_BV, seen_BV, sampling)
    if sampling.temperature:
        vocab = logits_BV.shape[-1]

        def noise(seed: Array) -> Array:
            key = jax.random.fold_in(jax.random.key(seed), count)
            return jax.random.gumbel(key, (vocab,), jnp.float32)

        logits_BV += jax.vmap(noise)(seed_B)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
