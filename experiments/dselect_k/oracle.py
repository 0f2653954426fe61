"""The best mixture of frozen experts: least squares over the simplex, by scipy."""

import numpy as np
from scipy.optimize import minimize

Moments = tuple[np.ndarray, np.ndarray, float]
"""A, c and y of the mean squared error q^T A q - 2 c^T q + y of a mixture q."""


def moments(features_NE: np.ndarray, target_N: np.ndarray) -> Moments:
    """The quadratic for frozen experts' outputs, in float64."""
    features_NE, target_N = features_NE.astype(np.float64), target_N.astype(np.float64)
    count = len(target_N)
    return (
        features_NE.T @ features_NE / count,
        features_NE.T @ target_N / count,
        float(target_N @ target_N / count),
    )


def mean_squared_error(weight_E: np.ndarray, moment: Moments):
    """Error of each mixture [..., E], exactly: it is a quadratic in the weights."""
    second_EE, cross_E, square = moment
    weight_E = weight_E.astype(np.float64)
    return np.sum(weight_E @ second_EE * weight_E, axis=-1) - 2 * weight_E @ cross_E + square


def best_mixture(moment: Moments) -> np.ndarray:
    """argmin of the error over q >= 0 with sum 1. Convex: what a gate misses, the gate missed.

    Raises:
      RuntimeError: SLSQP did not converge.
    """
    second_EE, cross_E, _ = moment
    num_experts = len(cross_E)
    found = minimize(
        lambda q_E: float(mean_squared_error(q_E, moment)),
        np.full(num_experts, 1 / num_experts),
        jac=lambda q_E: 2 * (second_EE @ q_E - cross_E),
        bounds=[(0.0, 1.0)] * num_experts,
        constraints={"type": "eq", "fun": lambda q_E: q_E.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    if not found.success:
        raise RuntimeError(f"SLSQP stopped without an optimum: {found.message}")
    return found.x
