"""Division in which nothing divided by nothing is unknown, not an error."""

import numpy as np

Numbers = np.ndarray | np.number | float | int


def ratio(above: Numbers, below: Numbers) -> np.ndarray:
    """``above / below`` in float64, NaN where `below` is 0."""
    top, bottom = np.broadcast_arrays(above, below)
    return np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom != 0)
