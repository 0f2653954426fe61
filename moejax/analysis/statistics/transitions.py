"""First choices in one layer against those in the next MoE layer."""

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.statistics.ratios import ratio
from moejax.record.counts import NONE


def transitions(
    first_T: Int[np.ndarray, " T"], second_T: Int[np.ndarray, " T"], num_experts: int
) -> Float[np.ndarray, "E E"]:
    """Share of tokens whose first choice is expert i (row), in the later layer j (column).

    Of the tokens that chose an expert in both layers: sums to 1.
    """
    both_T = (first_T != NONE) & (second_T != NONE)
    cell_T = first_T[both_T].astype(np.int64) * num_experts + second_T[both_T]
    count_EE = np.bincount(cell_T, minlength=num_experts**2).reshape(num_experts, num_experts)
    return ratio(count_EE, count_EE.sum())


def transition_lift(share_EE: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """`transitions` over what independent layers would give: 1 where they are, NaN if unused."""
    from_E1, to_1E = share_EE.sum(axis=1, keepdims=True), share_EE.sum(axis=0, keepdims=True)
    return ratio(share_EE, from_E1 * to_1E)
