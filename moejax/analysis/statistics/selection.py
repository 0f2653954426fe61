"""Which experts a token chose, whether or not they had room for it."""

import numpy as np
from jaxtyping import Bool, Float, Int

NONE = -1
"""The first choice of a token that chose no expert."""


def selected(
    expert_TK: Int[np.ndarray, "T K"], weight_TK: Float[np.ndarray, "T K"], num_experts: int
) -> Bool[np.ndarray, "T E"]:
    """Whether token t chose expert e: a column of weight 0 is inactive."""
    chosen_TE = np.zeros((len(expert_TK), num_experts), dtype=bool)
    token_P, column_P = np.nonzero(weight_TK > 0)
    chosen_TE[token_P, expert_TK[token_P, column_P]] = True
    return chosen_TE


def first_choice(
    expert_TK: Int[np.ndarray, "T K"], weight_TK: Float[np.ndarray, "T K"]
) -> Int[np.ndarray, " T"]:
    """The expert of largest weight, of equal ones the first column's; `NONE` without any."""
    column_T1 = np.argmax(weight_TK, axis=1, keepdims=True)
    expert_T = np.take_along_axis(expert_TK, column_T1, axis=1)[:, 0].astype(np.int64)
    return np.where(weight_TK.max(axis=1) > 0, expert_T, NONE)
