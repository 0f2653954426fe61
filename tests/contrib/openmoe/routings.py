"""Routings made by hand."""

import numpy as np

from moejax.record.routing import Routed

N, L, V, E = 60, 32, 6, 4


def tokens(seed=0, rows=N, length=L, vocabulary=V) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, length))


def routed(token_NL, expert, *, kept=None, weight=None, label_NL=None, names=(), num_experts=E):
    """``expert`` [M, N, L, K], or [N, L] for one layer and choice; weights fall with the column."""
    expert = np.asarray(expert)
    expert = expert[None, ..., None] if expert.ndim == 2 else expert
    if weight is None:
        weight = np.broadcast_to(1.0 / np.arange(1, expert.shape[-1] + 1), expert.shape)
    return Routed(
        expert,
        np.asarray(weight, np.float32),
        np.ones(expert.shape, bool) if kept is None else kept,
        token_NL,
        np.ones(token_NL.shape, bool),
        num_experts,
        label_NL,
        names,
    )


def first_come(expert_MNLK, capacity, order="position", num_experts=E, priority_MNL=None):
    """The pairs that find room, pair by pair: token by token, or by falling ``priority_MNL``."""
    kept = np.zeros(expert_MNLK.shape, bool)
    layers, rows, length, columns = expert_MNLK.shape
    for m in range(layers):
        for n in range(rows):
            left = [capacity] * num_experts
            tokens = range(length)
            if order == "gate":
                assert priority_MNL is not None
                tokens = sorted(tokens, key=lambda t, m=m, n=n: -priority_MNL[m, n, t])
            for t in tokens:
                for k in range(columns):
                    expert = expert_MNLK[m, n, t, k]
                    kept[m, n, t, k] = left[expert] > 0
                    left[expert] -= int(left[expert] > 0)
    return kept
