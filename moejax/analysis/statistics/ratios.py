"""Division in which nothing divided by nothing is unknown, not an error."""

import numpy as np


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """``above / below`` in float64, NaN where `below` is 0."""
    above, below = np.broadcast_arrays(above, below)
    out = np.full(below.shape, np.nan)
    return np.divide(above, below, out=out, where=below != 0)
