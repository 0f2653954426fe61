"""Statistics of a layer's inputs: how widely they vary, and how well experts separate them."""

import numpy as np
from jaxtyping import Float, Int

RESOLUTION = 1e-7
"""Directions in which the experts' means differ by less than this share of their largest difference
count as rounding of float32."""


def participation(x_TD: Float[np.ndarray, "T D"]) -> float:
    r"""The participation ratio: the number of directions along which the tokens vary.

    .. math:: \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}
       \quad \text{with } \lambda \text{ the eigenvalues of the covariance of } x

    D if the tokens vary equally in all directions, 1 if they lie on a line or are all the same.
    Computed without the eigenvalues: numerator and denominator are the squared trace and the
    squared Frobenius norm of the covariance.
    """
    centred_TD = (x_TD - np.mean(x_TD, axis=0, dtype=np.float64)).astype(np.float32)
    tokens, width = centred_TD.shape
    # The smaller one of X'X and XX', which have the same nonzero eigenvalues.
    scatter = centred_TD.T @ centred_TD if width <= tokens else centred_TD @ centred_TD.T
    square = np.sum(np.square(scatter))
    return float(np.trace(scatter) ** 2 / square) if square else 1.0


def collapse(x_TD: Float[np.ndarray, "T D"], expert_T: Int[np.ndarray, "T"]) -> float:
    r"""Variation within the tokens of one expert over that between experts.

    .. math::
       \operatorname{Tr}(\Sigma_W \Sigma_B^+), \quad
       \Sigma_W = \frac1T \sum_t (x_t - \mu_{e(t)}) (x_t - \mu_{e(t)})^\top, \quad
       \Sigma_B = \sum_e \frac{n_e}{T} (\mu_e - \mu) (\mu_e - \mu)^\top

    with n_e tokens whose expert is e, their mean mu_e, and the mean mu of all. The lower, the more
    the tokens of an expert have collapsed towards one point. NaN where fewer than two experts have
    tokens, where their means are equal, and for tokens that are not finite.

    Computed without either matrix. Let s and v be the singular values and right singular vectors of
    the [E, D] matrix of means, weighted as in Sigma_B. Since the total variance is that within and
    that between the classes, the result is the sum over i of Var(x . v_i) / s_i^2 - 1.

    Reference: Chi et al., "On the Representation Collapse of Sparse Mixture of Experts", arXiv
    2204.09179, with experts as the classes of Papyan, Han, Donoho, arXiv 2008.08186. Here experts
    are weighted in Sigma_B by their share of the tokens, so that one with few does not dominate.
    """
    used, class_T, count_E = np.unique(expert_T, return_inverse=True, return_counts=True)
    if len(used) < 2 or not np.isfinite(x_TD).all():
        return float("nan")
    centred_TD = x_TD - np.mean(x_TD, axis=0, dtype=np.float64)
    member_ET = (np.arange(len(used))[:, None] == class_T).astype(np.float64)
    between_ED = member_ET @ centred_TD / np.sqrt(count_E * len(x_TD))[:, None]
    _, length_R, direction_RD = np.linalg.svd(between_ED, full_matrices=False)
    known_R = length_R > RESOLUTION * length_R[0]
    if not known_R.any():
        return float("nan")
    variance_R = np.mean(np.square(centred_TD @ direction_RD[known_R].T), axis=0)
    return float(np.sum(variance_R / np.square(length_R[known_R]) - 1.0))
