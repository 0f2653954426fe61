"""Ratios, and means, quantiles and histograms of values over tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Numbers = np.ndarray | np.number | float | int


def ratio(above: Numbers, below: Numbers) -> np.ndarray:
    """``above / below`` in float64, NaN where `below` is 0."""
    top, bottom = np.broadcast_arrays(above, below)
    return np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom != 0)


def spread(
    value_T: Float[np.ndarray, "... T"], levels: Sequence[float]
) -> Float[np.ndarray, "... X"]:
    """X: the mean over tokens, then their quantiles at ``levels`` (float64, interpolated).

    NaN throughout where a token's value is not finite or there are no tokens.
    """
    wide_T = value_T.astype(np.float64)
    result = np.full((*value_T.shape[:-1], 1 + len(levels)), np.nan)
    known = np.isfinite(wide_T).all(axis=-1) & (value_T.shape[-1] > 0)
    if known.any():
        result[known, 0] = wide_T[known].mean(axis=-1)
        result[known, 1:] = np.quantile(wide_T[known], levels, axis=-1).T
    return result


def histogram(
    value_T: Float[np.ndarray, " T"], edges: Float[np.ndarray, " edges"]
) -> Float[np.ndarray, " bins"]:
    """Share of tokens between neighbouring edges; the last bin includes its upper one."""
    return ratio(np.histogram(value_T, edges)[0], value_T.size)


def between(similarity_EE: Float[np.ndarray, "... E E"]) -> Float[np.ndarray, "..."]:
    """The mean off the diagonal: over pairs of different experts. NaN for a single expert."""
    num_experts = similarity_EE.shape[-1]
    off_EE = ~np.eye(num_experts, dtype=bool)
    total = np.sum(similarity_EE, axis=(-2, -1), where=off_EE, dtype=np.float64)
    return ratio(total, num_experts * (num_experts - 1))
