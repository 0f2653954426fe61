r"""The balance of (token, expert) pairs over experts.

Functions of a load: pairs per expert, n_e, on the last axis; f_e = n_e / sum n is its share. All
are NaN where there are no pairs.
"""

import numpy as np
from jaxtyping import Bool, Float, Shaped

from moejax.analysis.statistics.values import ratio

Load = Shaped[np.ndarray, "... E"]
PerLoad = Float[np.ndarray, "..."]


def share(load_E: Load) -> Float[np.ndarray, "... E"]:
    """f: sums to 1 over experts."""
    return ratio(load_E, load_E.sum(axis=-1, keepdims=True))


def entropy(load_E: Load) -> PerLoad:
    r"""H(f) = -\sum_e f_e \log f_e in nats: log E at perfect balance, 0 when one gets all."""
    share_E = share(load_E)
    logarithm_E = np.log(np.where(share_E > 0, share_E, 1.0))
    return np.asarray(np.abs(np.sum(share_E * logarithm_E, axis=-1)))  # each term is negative or 0


def relative_entropy(load_E: Load) -> PerLoad:
    """H(f) / log E, in [0, 1]: 1 at perfect balance. NaN for a single expert."""
    return ratio(entropy(load_E), np.log(load_E.shape[-1]))


def effective_experts(load_E: Load) -> PerLoad:
    """exp H(f), in [1, E]: the number of equally used experts with this entropy."""
    return np.asarray(np.exp(entropy(load_E)))


def variation(load_E: Load) -> PerLoad:
    """Coefficient of variation: standard deviation over experts (of E, not E - 1) over the mean."""
    return ratio(load_E.std(axis=-1), load_E.mean(axis=-1))


def max_violation(load_E: Load) -> PerLoad:
    """MaxVio = max n / mean n - 1 (Wang et al., arXiv 2408.15664): 0 at balance, at most E - 1."""
    return np.asarray(ratio(load_E.max(axis=-1), load_E.mean(axis=-1)) - 1)


def gini(load_E: Load) -> PerLoad:
    r"""Gini coefficient \sum_{ij} |n_i - n_j| / (2 E \sum n), in [0, 1 - 1/E]; 0 at balance."""
    num_experts = load_E.shape[-1]
    # Sorted: the i-th load (from 1) is the larger one i - 1 times and the smaller one E - i times.
    signs_E = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    total = load_E.sum(axis=-1)
    return ratio(np.sum(signs_E * np.sort(load_E, axis=-1), axis=-1), num_experts * total)


def dead(load_WE: Shaped[np.ndarray, "W ... E"]) -> Bool[np.ndarray, "... E"]:
    """Experts that got no pair in any row of a window, the first axis; none of an empty window."""
    return (load_WE.sum(axis=0) == 0) & (len(load_WE) > 0)
