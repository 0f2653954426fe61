"""Means and quantiles over tokens."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of one number per token; NaN throughout if any token lacks it or there are no tokens."""

    mean: float
    quantiles: tuple[float, ...]


def spread(value_T: Float[np.ndarray, " T"], levels: Sequence[float]) -> Spread:
    """The mean and the quantiles at `levels`, in float64, interpolated linearly."""
    if not value_T.size or not np.isfinite(value_T).all():
        return Spread(float("nan"), (float("nan"),) * len(levels))
    wide_T = value_T.astype(np.float64)
    return Spread(float(wide_T.mean()), tuple(map(float, np.quantile(wide_T, levels))))
