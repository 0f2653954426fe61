"""Specialisation: the kinds of tokens that experts get, and the information kinds carry.

A kind is a domain or a token id, 0 <= kind < C. A pair is a (token, expert) choice.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from moejax.analysis.statistics.balance import entropy
from moejax.analysis.statistics.values import ratio


def share_of_kind(counts_CE: Int[np.ndarray, "C E"]) -> Float[np.ndarray, "C E"]:
    """The share of a kind's pairs that each expert gets: a row sums to 1, NaN for an unseen kind.

    OLMoE's domain specialisation (Muennighoff et al., arXiv 2409.02060, eq. 7) divides by tokens
    instead of pairs: k times this where every token chooses k experts.
    """
    return ratio(counts_CE, counts_CE.sum(axis=1, keepdims=True))


def lift(counts_CE: Int[np.ndarray, "C E"]) -> Float[np.ndarray, "C E"]:
    """`share_of_kind` over the expert's share of all pairs: 1 where the kind does not matter."""
    blind_1E = ratio(counts_CE.sum(axis=0, keepdims=True), counts_CE.sum())
    return ratio(share_of_kind(counts_CE), blind_1E)


@dataclasses.dataclass(frozen=True)
class Favourite:
    """A kind that an expert gets more than other kinds."""

    kind: int
    lift: float
    pairs: int
    """The number of pairs of this kind and expert."""


def favourites(
    counts_CE: Int[np.ndarray, "C E"], tokens_C: Int[np.ndarray, " C"], least: int, most: int
) -> list[list[Favourite]]:
    """For each expert up to `most` kinds of lift above 1, the largest lift first.

    Only kinds seen `least` times or more: the lift of a rare one is chance. Equal lifts are
    ordered by pairs, the larger number first, then by id.
    """
    lift_CE = lift(counts_CE)
    kinds = np.flatnonzero(tokens_C >= least)
    result = []
    for expert in range(counts_CE.shape[1]):
        above = kinds[lift_CE[kinds, expert] > 1]
        order = np.lexsort((above, -counts_CE[above, expert], -lift_CE[above, expert]))
        result.append(
            [
                Favourite(int(c), float(lift_CE[c, expert]), int(counts_CE[c, expert]))
                for c in above[order[:most]]
            ]
        )
    return result


def peak_share(
    counts_CE: Int[np.ndarray, "C E"], tokens_C: Int[np.ndarray, " C"], least: int
) -> float:
    """max_e N_{c,e} / N_c, mean over kinds seen `least` times or more; NaN if there are none.

    OLMoE's vocabulary specialisation (arXiv 2409.02060, eq. 8) where kinds are token ids: the share
    of an id's occurrences that its favourite expert gets. Ids seen once would score 1.
    """
    often_C = tokens_C >= least
    peak_C = ratio(counts_CE.max(axis=1), tokens_C)[often_C]
    return float(peak_C.mean()) if len(peak_C) else float("nan")


def explained(selected_TE: Bool[np.ndarray, "T E"], kind_T: Integer[np.ndarray, " T"]) -> float:
    """I(expert; kind) / H(expert), in [0, 1]: 1 when a token's kind decides which expert it gets.

    NaN when all pairs go to one expert. With k > 1 choices a token has k pairs, so a kind that
    decides all of them still leaves open which of the k a pair is: then at most
    1 - log k / H(expert). Few tokens of a kind make it large by chance: see `explained_by_chance`.
    """
    token_P, expert_P = np.nonzero(selected_TE)
    return _explained(expert_P, kind_T[token_P])


def explained_by_chance(
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
    # Few pairs of token id and expert occur, so these are sorted instead of tabulated.
    cell_P = kind_P.astype(np.int64) * (int(expert_P.max(initial=0)) + 1) + expert_P
    _, both = np.unique(cell_P, return_counts=True)
    of_expert = np.bincount(expert_P)
    return float(ratio(_information(np.bincount(kind_P), of_expert, both), entropy(of_expert)))


def _information(of_first: np.ndarray, of_second: np.ndarray, of_both: np.ndarray) -> float:
    """Mutual information from three lists of counts; negative values are rounding."""
    return float(np.maximum(entropy(of_first) + entropy(of_second) - entropy(of_both), 0.0))
