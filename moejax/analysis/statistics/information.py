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


def mutual_information(
    first_P: Integer[np.ndarray, " P"], second_P: Integer[np.ndarray, " P"]
) -> float:
    """I of two numbers >= 0 in nats, from P joint samples: H(first) + H(second) - H(both).

    The plug-in estimate: on average too large, by about (values - 1)(values - 1) / 2P where the
    two are independent (Miller 1955).
    """
    # Of token ids and experts few pairs occur, so these are sorted instead of tabulated.
    cell_P = first_P.astype(np.int64) * (int(second_P.max(initial=0)) + 1) + second_P
    _, both = np.unique(cell_P, return_counts=True)
    separate = entropy(np.bincount(first_P)) + entropy(np.bincount(second_P))
    # Rounding alone makes it negative.
    return float(np.maximum(separate - entropy(both), 0.0))


def _explained(expert_P: Integer[np.ndarray, " P"], kind_P: Integer[np.ndarray, " P"]) -> float:
    return float(ratio(mutual_information(expert_P, kind_P), entropy(np.bincount(expert_P))))
