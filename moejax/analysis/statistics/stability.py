"""How routing of the same tokens moves between two recordings."""

import numpy as np
from jaxtyping import Bool, Int

from moejax.analysis.statistics.ratios import ratio


def churn(before_T: Int[np.ndarray, " T"], after_T: Int[np.ndarray, " T"]) -> float:
    """Share of tokens whose first choice is another one: StableMoE's fluctuation.

    Dai et al., arXiv 2204.08396. A token that chose no expert counts as one that chose "none".
    """
    return float(ratio(np.sum(before_T != after_T), before_T.size))


def saturation(selected_TE: Bool[np.ndarray, "T E"], last_TE: Bool[np.ndarray, "T E"]) -> float:
    r"""Router saturation: mean over tokens of |chosen then and at last| / |chosen at last|.

    .. math:: RS(t) = \frac{1}{N} \sum_{i=1}^{N} \frac{|E_i^{(t)} \cap E_i^{(T)}|}{k}

    (Muennighoff et al., arXiv 2409.02060, eq. 5.) Tokens that choose no expert at last are left
    out. 1 when routing has reached where it ends; `saturation_by_chance` when it is unrelated.
    """
    both_T, last_T = np.sum(selected_TE & last_TE, axis=1), np.sum(last_TE, axis=1)
    routed_T = last_T > 0
    return float(ratio(np.sum(both_T[routed_T] / last_T[routed_T]), np.sum(routed_T)))


def saturation_by_chance(selected_TE: Bool[np.ndarray, "T E"]) -> float:
    """`saturation` of choices unrelated to the last ones: k / E, with k the mean of choices."""
    return float(ratio(selected_TE.sum(), selected_TE.size))
