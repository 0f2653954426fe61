"""Rotary positions, and the scalings that reach beyond the length of training."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.options import RopeOptions


def frequencies(options: RopeOptions, width: int) -> Float[np.ndarray, "P"]:
    r"""Radians per position of each rotated pair of a head of this width.

    Without scaling, pair i of P = share * width / 2 turns by theta^(-i/P). A scaling by the factor
    s divides the frequency of slow pairs by s and leaves fast ones:

    * linear: all are divided (Chen et al., arXiv 2306.15595);
    * llama3: with n turns in ``trained_length``, the kept share is
      (n - low_turns) / (high_turns - low_turns), between 0 and 1 (Llama 3.1's released code);
    * yarn: the kept share falls linearly with the index of the pair between the pairs that make
      ``high_turns`` and ``low_turns`` turns (Peng et al., arXiv 2309.00071).

    longrope divides the frequency of each pair by a number of its own (Ding et al., arXiv
    2402.13753): one of ``short_factors``, or with ``long`` one of ``long_factors``. Deviation:
    released code takes the long ones as soon as a sequence is longer than ``trained_length``. Here
    ``long`` decides for all sequences, because a remembered key keeps the rotation that it got when
    the sequence was shorter; without ``long``, sequences up to ``trained_length`` are as there.
    """
    assert options.theta is not None
    pairs = options.rotated(width) // 2
    plain_P = options.theta ** (-np.arange(pairs) / pairs)
    if options.scaling == "none":
        return plain_P
    if options.scaling == "longrope":
        return plain_P / np.array(options.factors)
    kept_P = np.zeros(pairs)
    if options.scaling == "llama3":
        turns_P = options.trained_length * plain_P / (2 * math.pi)
        kept_P = (turns_P - options.low_turns) / (options.high_turns - options.low_turns)
    elif options.scaling == "yarn":
        first, last = _yarn_bounds(options, pairs)
        kept_P = 1 - (np.arange(pairs) - first) / max(last - first, 1e-3)
    kept_P = np.clip(kept_P, 0, 1)
    return plain_P * kept_P + plain_P / options.factor * (1 - kept_P)


def _yarn_bounds(options: RopeOptions, pairs: int) -> tuple[float, float]:
    """The indices of the pairs that make ``high_turns`` and ``low_turns`` turns."""

    def index(turns: float) -> float:
        positions = options.trained_length / (turns * 2 * math.pi)
        return pairs * math.log(positions) / math.log(options.theta or 1.0)

    first, last = index(options.high_turns), index(options.low_turns)
    if options.whole_pairs:
        first, last = float(math.floor(first)), float(math.ceil(last))
    return max(first, 0.0), min(last, 2.0 * pairs - 1.0)


def magnitude(options: RopeOptions) -> float:
    """The factor of rotated queries and keys, which is their temperature; 1 but for two scalings.

    Without ``magnitude``, YaRN has 0.1 ln(factor) + 1 and LongRoPE
    sqrt(1 + ln(factor) / ln(trained_length)).
    """
    if options.scaling == "yarn":
        return options.magnitude or 0.1 * math.log(options.factor) + 1.0
    if options.scaling == "longrope":
        ratio = math.log(options.factor) / math.log(options.trained_length)
        given = options.long_magnitude if options.long else 0.0
        return given or options.magnitude or math.sqrt(1.0 + ratio)
    return 1.0


def rotate(
    x_BLHI: Float[Array, "B L H I"], position_BL: Int[Array, "B L"], options: RopeOptions
) -> Float[Array, "B L H I"]:
    """Rotary position embedding (Su et al., arXiv 2104.09864), computed in float32.

    The first ``share`` of the width is rotated, in pairs of one number from each half of it, or of
    neighbours.
    """
    width = x_BLHI.shape[-1]
    size = options.rotated(width)
    frequency_P = jnp.asarray(frequencies(options, width), jnp.float32)
    angle = position_BL[..., None, None].astype(jnp.float32) * frequency_P
    scale = magnitude(options)
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    rotated, rest = jnp.split(x_BLHI.astype(jnp.float32), [size], axis=-1)
    if options.interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    if options.interleaved:
        turned = jnp.stack(parts, axis=-1).reshape(rotated.shape)
    else:
        turned = jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([turned, rest], axis=-1).astype(x_BLHI.dtype)
