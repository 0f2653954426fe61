"""How much a token's kind says about its expert."""

import numpy as np
from jaxtyping import Bool, Float, Integer

from moejax.analysis.statistics.balance import entropy
from moejax.analysis.statistics.ratios import ratio


def explained(selected_TE: Bool[np.ndarray, "T E"], kind_T: Integer[np.ndarray, " T"]) -> float:
    """I(expert; kind) / H(expert), in [0, 1]: 1 when a token's kind decides which expert it gets.

    NaN when all pairs go to one expert. With k > 1 choices a token has k pairs, so a kind that
    decides all of them still leaves open which of the k a pair is: then at most
    1 - log k / H(expert). Few tokens of a kind make it large by chance: see `null`.
    """
    token_P, expert_P = np.nonzero(selected_TE)
    return _explained(expert_P, kind_T[token_P])


def null(
    selected_TE: Bool[np.ndarray, "T E"], kind_T: Integer[np.ndarray, " T"], repeats: int, seed: int
) -> Float[np.ndarray, " repeats"]:
    """`explained` of routing that ignores kinds: kinds shuffled over tokens, `repeats` times."""
    random = np.random.default_rng(seed)
    token_P, expert_P = np.nonzero(selected_TE)
    shuffles = (random.permutation(kind_T)[token_P] for _ in range(repeats))
    return np.array([_explained(expert_P, kind_P) for kind_P in shuffles])


def mutual_information(counts_CE: Integer[np.ndarray, "C E"]) -> float:
    """I of row and column in nats, from counts of joint samples: H(C) + H(E) - H(C, E).

    The plug-in estimate: on average too large, by about (C - 1)(E - 1) over twice the number of
    samples where the two are independent (Miller 1955).
    """
    return _information(counts_CE.sum(axis=1), counts_CE.sum(axis=0), counts_CE.reshape(-1))


def _explained(expert_P: Integer[np.ndarray, " P"], kind_P: Integer[np.ndarray, " P"]) -> float:
    # Of token ids and experts few pairs occur, so these are sorted instead of tabulated.
    cell_P = kind_P.astype(np.int64) * (int(expert_P.max(initial=0)) + 1) + expert_P
    _, both = np.unique(cell_P, return_counts=True)
    of_expert = np.bincount(expert_P)
    return float(ratio(_information(np.bincount(kind_P), of_expert, both), entropy(of_expert)))


def _information(of_first: np.ndarray, of_second: np.ndarray, of_both: np.ndarray) -> float:
    """From the three lists of counts; below 0 it is rounding."""
    return float(np.maximum(entropy(of_first) + entropy(of_second) - entropy(of_both), 0.0))
