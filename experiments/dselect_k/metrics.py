"""Measures of a run: functions of weights over time (numpy), and intervals over seeds.

S: steps, the start included. E: experts.
"""

import numpy as np
from scipy import stats

VISIBLE = 1e-3
"""A weight below this is counted as visited and as nothing else."""


def selected(weight_E: np.ndarray, k: int) -> np.ndarray:
    """Mask [..., E] of the k experts of largest weight, as far as their weight is not 0.

    For a gate whose weights are all positive this is the top k of a dense mixture. Ties go to the
    lower expert.
    """
    rank_E = np.argsort(np.argsort(-weight_E, axis=-1, kind="stable"), axis=-1)
    return (rank_E < k) & (weight_E > 0)


def jaccard(one_E: np.ndarray, other_E: np.ndarray) -> np.ndarray:
    """Common experts over experts in either set; of two empty sets 1."""
    both = np.sum(one_E & other_E, axis=-1)
    either = np.sum(one_E | other_E, axis=-1)
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def total_variation(weight_SE: np.ndarray) -> np.ndarray:
    """sum_t |q_t - q_{t-1}|_1: how far the weights travel on their way [...]."""
    return np.sum(np.abs(np.diff(weight_SE.astype(np.float64), axis=-2)), axis=(-2, -1))


def support_changes(weight_SE: np.ndarray, k: int) -> np.ndarray:
    """Steps after which another set of experts is `selected` than before them [...]."""
    chosen_SE = selected(weight_SE, k)
    return np.sum(np.any(chosen_SE[..., 1:, :] != chosen_SE[..., :-1, :], axis=-1), axis=-1)


def steps_to_final(error_S: np.ndarray, share: float = 0.01) -> int:
    """The first step from which the error stays where it ends.

    That is: within ``share`` of the distance between its first and its last value.
    """
    far_S = np.abs(error_S - error_S[-1]) > share * abs(error_S[0] - error_S[-1])
    return int(np.max(np.flatnonzero(far_S), initial=-1)) + 1


def mean_interval(value_R: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds, and the ends of its 95 % interval by Student's t (NaN for one seed)."""
    value_R = np.asarray(value_R, np.float64)
    mean, count = float(value_R.mean()), len(value_R)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, count - 1) * value_R.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def share_interval(hit_R: np.ndarray) -> tuple[float, float, float]:
    """Share of seeds, and the ends of Wilson's 95 % interval."""
    count, z = len(hit_R), float(stats.norm.ppf(0.975))
    share = float(np.mean(hit_R))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return share, float(middle - half), float(middle + half)
