"""Chosen experts and counts of pairs, from a routing in NumPy, with or without room for the pairs.

A pair is a (token, expert) choice. A column of weight 0 is inactive.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

NONE = -1
"""The expert of an inactive column, and the first choice of a token that chose no expert."""


def selected(
    expert_TK: Int[np.ndarray, "T K"], weight_TK: Float[np.ndarray, "T K"], num_experts: int
) -> Bool[np.ndarray, "T E"]:
    """True where token t chose expert e."""
    chosen_TE = np.zeros((len(expert_TK), num_experts), dtype=bool)
    token_P, column_P = np.nonzero(weight_TK > 0)
    chosen_TE[token_P, expert_TK[token_P, column_P]] = True
    return chosen_TE


def first_choice(
    expert_TK: Int[np.ndarray, "*T K"], weight_TK: Float[np.ndarray, "*T K"]
) -> Int[np.ndarray, "*T"]:
    """The expert of largest weight, the first column's among equal ones; `NONE` without any."""
    column_T1 = np.argmax(weight_TK, axis=-1, keepdims=True)
    expert_T = np.take_along_axis(expert_TK, column_T1, axis=-1)[..., 0].astype(np.int64)
    return np.where(weight_TK.max(axis=-1) > 0, expert_T, NONE)


def pair_counts(
    selected_TE: Bool[np.ndarray, "T E"], kind_T: Integer[np.ndarray, " T"], num_kinds: int
) -> Int[np.ndarray, "C E"]:
    """Pairs of each kind of token, 0 <= kind < C, and each expert."""
    token_P, expert_P = np.nonzero(selected_TE)
    return _counts(kind_T[token_P], expert_P, num_kinds, selected_TE.shape[1])


def choice_counts(
    choice_TK: Int[np.ndarray, "T K"],
    kind_T: Integer[np.ndarray, " T"],
    num_kinds: int,
    num_experts: int,
) -> Int[np.ndarray, "C E"]:
    """`pair_counts` from the chosen experts; choices of `NONE` do not count."""
    token_P, column_P = np.nonzero(choice_TK != NONE)
    return _counts(kind_T[token_P], choice_TK[token_P, column_P], num_kinds, num_experts)


def _counts(
    kind_P: Integer[np.ndarray, " P"],
    expert_P: Integer[np.ndarray, " P"],
    num_kinds: int,
    num_experts: int,
) -> Int[np.ndarray, "C E"]:
    cell_P = kind_P.astype(np.int64) * num_experts + expert_P
    counts = np.bincount(cell_P, minlength=num_kinds * num_experts)
    return counts.reshape(num_kinds, num_experts)
