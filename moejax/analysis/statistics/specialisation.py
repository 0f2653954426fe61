"""Which kinds of tokens an expert gets, against what it gets of all tokens.

A kind is a domain or a token id, 0 <= kind < C. A pair is a (token, expert) choice.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.statistics.ratios import ratio


def share_of_kind(counts_CE: Int[np.ndarray, "C E"]) -> Float[np.ndarray, "C E"]:
    """Of a kind's pairs, the share each expert gets: a row sums to 1, NaN for a kind unseen.

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
    """A kind of which an expert gets more than of other kinds."""

    kind: int
    lift: float
    pairs: int
    """Of this kind and expert."""


def favourites(
    counts_CE: Int[np.ndarray, "C E"], tokens_C: Int[np.ndarray, " C"], least: int, most: int
) -> list[list[Favourite]]:
    """For each expert up to `most` kinds of lift above 1, the largest lift first.

    Only kinds seen `least` times or more: the lift of a rare one is chance. Of equal lifts, the
    kind with more pairs comes first, then the smaller id.
    """
    lift_CE = lift(counts_CE)
    kinds = np.flatnonzero(tokens_C >= least)
    found = []
    for expert in range(counts_CE.shape[1]):
        above = kinds[lift_CE[kinds, expert] > 1]
        order = np.lexsort((above, -counts_CE[above, expert], -lift_CE[above, expert]))
        found.append(
            [
                Favourite(int(c), float(lift_CE[c, expert]), int(counts_CE[c, expert]))
                for c in above[order[:most]]
            ]
        )
    return found


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
