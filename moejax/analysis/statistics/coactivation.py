"""Which experts are chosen together."""

import numpy as np
from jaxtyping import Bool, Float

from moejax.analysis.statistics.ratios import ratio


def coactivation(selected_TE: Bool[np.ndarray, "T E"]) -> Float[np.ndarray, "E E"]:
    """N_ij / N_i: of the tokens that chose expert i (row), the share that chose j (column) too.

    Asymmetric. The diagonal is NaN, as are rows of experts that nobody chose. All pairs count;
    OLMoE's published script counts those adjacent in the order of weights only (Muennighoff et al.,
    arXiv 2409.02060, eq. 6).
    """
    # float32 products are fast and exact for counts below 2^24.
    chosen_TE = selected_TE.astype(np.float32)
    both_EE = (chosen_TE.T @ chosen_TE).astype(np.float64)
    together_EE = ratio(both_EE, np.diagonal(both_EE)[:, None])
    np.fill_diagonal(together_EE, np.nan)
    return together_EE


def chance(selected_TE: Bool[np.ndarray, "T E"]) -> float:
    """N_ij / N_i without any preference: (k - 1) / (E - 1) when every token chooses k experts.

    For tokens that choose different numbers: others a pair has on average, over E - 1.
    """
    chosen_T = selected_TE.sum(axis=1)
    others = ratio(np.sum(chosen_T * (chosen_T - 1)), np.sum(chosen_T))
    return float(ratio(others, selected_TE.shape[1] - 1))
