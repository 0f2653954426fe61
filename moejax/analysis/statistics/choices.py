"""Choices of experts: co-activation, transitions between layers, and changes between recordings."""

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.analysis.statistics.values import ratio
from moejax.record.counts import NONE


def coactivation(selected_TE: Bool[np.ndarray, "T E"]) -> Float[np.ndarray, "E E"]:
    """N_ij / N_i: of the tokens that chose expert i (row), the share that chose j (column) too.

    Asymmetric. The diagonal is NaN, as are rows of experts that no token chose. All pairs count;
    OLMoE's published script counts those adjacent in the order of weights only (Muennighoff et al.,
    arXiv 2409.02060, eq. 6).
    """
    # float32 products are fast and exact for counts below 2^24.
    chosen_TE = selected_TE.astype(np.float32)
    both_EE = (chosen_TE.T @ chosen_TE).astype(np.float64)
    together_EE = ratio(both_EE, np.diagonal(both_EE)[:, None])
    np.fill_diagonal(together_EE, np.nan)
    return together_EE


def coactivation_by_chance(selected_TE: Bool[np.ndarray, "T E"]) -> float:
    """N_ij / N_i without any preference: (k - 1) / (E - 1) when every token chooses k experts.

    For tokens that choose different numbers: others a pair has on average, over E - 1.
    """
    chosen_T = selected_TE.sum(axis=1)
    others = ratio(np.sum(chosen_T * (chosen_T - 1)), np.sum(chosen_T))
    return float(ratio(others, selected_TE.shape[1] - 1))


def transitions(
    first_T: Int[np.ndarray, " T"], second_T: Int[np.ndarray, " T"], num_experts: int
) -> Float[np.ndarray, "E E"]:
    """Share of tokens whose first choice is expert i (row), in the later layer j (column).

    Counts the tokens that chose an expert in both layers: sums to 1.
    """
    both_T = (first_T != NONE) & (second_T != NONE)
    cell_T = first_T[both_T].astype(np.int64) * num_experts + second_T[both_T]
    count_EE = np.bincount(cell_T, minlength=num_experts**2).reshape(num_experts, num_experts)
    return ratio(count_EE, count_EE.sum())


def transition_lift(share_EE: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """`transitions` over what independent layers would give: 1 where they are, NaN if unused."""
    from_E1, to_1E = share_EE.sum(axis=1, keepdims=True), share_EE.sum(axis=0, keepdims=True)
    return ratio(share_EE, from_E1 * to_1E)


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
