"""How alike experts, or rows of a router, are."""

import numpy as np
from jaxtyping import Float

from moejax.analysis.statistics.ratios import ratio


def between(similarity_EE: Float[np.ndarray, "... E E"]) -> Float[np.ndarray, "..."]:
    """The mean off the diagonal: over pairs of different experts. NaN for a single expert."""
    num_experts = similarity_EE.shape[-1]
    off_EE = ~np.eye(num_experts, dtype=bool)
    total = np.sum(similarity_EE, axis=(-2, -1), where=off_EE, dtype=np.float64)
    return ratio(total, num_experts * (num_experts - 1))
