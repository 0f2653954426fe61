"""How much a token's kind says about its expert."""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from moejax.analysis.statistics.balance import entropy
from moejax.analysis.statistics.ratios import ratio
from moejax.analysis.statistics.specialisation import pair_counts


def mutual_information(counts_CE: Int[np.ndarray, "C E"]) -> float:
    """I(kind; expert) in nats of the pairs' empirical distribution: H(C) + H(E) - H(C, E)."""
    of_kind, of_expert = entropy(counts_CE.sum(axis=1)), entropy(counts_CE.sum(axis=0))
    # Rounding alone makes it negative.
    return float(np.maximum(of_kind + of_expert - entropy(counts_CE.reshape(-1)), 0.0))


def explained(selected_TE: Bool[np.ndarray, "T E"], kind_T: Integer[np.ndarray, " T"]) -> float:
    """I(expert; kind) / H(expert), in [0, 1]: 1 when a token's kind decides which expert it gets.

    NaN when all pairs go to one expert. With k > 1 choices a token has k pairs, so a kind that
    decides all of them still leaves open which of the k a pair is: then at most
    1 - log k / H(expert). Few tokens of a kind make it large by chance: see `null`.
    """
    _, kind_T = np.unique(kind_T, return_inverse=True)
    counts_CE = pair_counts(selected_TE, kind_T, int(kind_T.max(initial=-1)) + 1)
    return float(ratio(mutual_information(counts_CE), entropy(counts_CE.sum(axis=0))))


def null(
    selected_TE: Bool[np.ndarray, "T E"], kind_T: Integer[np.ndarray, " T"], repeats: int, seed: int
) -> Float[np.ndarray, " repeats"]:
    """`explained` of routing that ignores kinds: kinds shuffled over tokens, `repeats` times."""
    random = np.random.default_rng(seed)
    return np.array([explained(selected_TE, random.permutation(kind_T)) for _ in range(repeats)])
