"""The routed scaling law of Clark et al. 2022 and its fit.

With N parameters seen by a token and E experts, the loss L of a trained model follows

    log10 L = a log10 N + b log10 Eh + c log10 N log10 Eh + d
    1 / Eh  = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1 / E_max

(equations 1 and 2 of arXiv 2202.01169). Eh is E between two saturations: it is E_start at E = 1 and
E_max at most. Runs of one size cannot tell a, c and d apart; they get the reduced law
``log10 L = b log10 Eh + d``.

The fit is exact in the linear coefficients: for given E_start and E_max they are a linear least
squares problem, so the search has two dimensions (variable projection, with Kaufman's Jacobian).
It searches ln delta and ln E_max, where delta = 1 / (1/E_start - 1/E_max); any positive pair of
them is a law with E_start < E_max.

Axes: R runs, C linear coefficients.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

Reals = Float[np.ndarray, " R"]

FULL = ("a", "b", "c", "d")
REDUCED = ("b", "d")
SATURATION = ("E_start", "E_max")

LOWEST = np.log([0.1, 2.0])
HIGHEST = np.log([1e3, 1e6])
"""Bounds of (delta, E_max); a fit that ends on a bound has found no saturation there."""

_STARTS = tuple(itertools.product(np.log([0.5, 2.0, 8.0, 64.0]), np.log([8.0, 64.0, 512.0, 1e4])))
_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Law:
    """Coefficients of the law; ``a`` and ``c`` are 0 in the reduced law, for runs of one size."""

    a: float
    b: float
    c: float
    d: float
    E_start: float
    E_max: float
    reduced: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The coefficients that were fitted."""
        return (*(REDUCED if self.reduced else FULL), *SATURATION)

    @property
    def at_bound(self) -> tuple[str, ...]:
        """E_start or E_max if it lies on a bound of the search: the runs do not determine it."""
        inner = np.log([_delta(self.E_start, self.E_max), self.E_max])
        on = (inner <= LOWEST + 1e-6) | (inner >= HIGHEST - 1e-6)
        return tuple(name for name, hit in zip(SATURATION, on, strict=True) if hit)

    def loss(self, size_R: Any, experts_R: Any) -> Reals:
        """The law's loss for sizes and numbers of experts, in the unit of the runs it was fitted
        to."""
        n = np.log10(np.asarray(size_R, float))
        e = np.log10(saturated(experts_R, self.E_start, self.E_max))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def effective_size(self, size_R: Any, experts_R: Any) -> Reals:
        """The size of the dense model (E = 1) with the loss of N parameters and E experts.

        ``log10 Nbar = (a n + b e + c n e - b s) / (a + c s)``, n = log10 N, e = log10 Eh,
        s = log10 E_start: the effective parameter count of section 5. Full law only.
        """
        n = np.log10(np.asarray(size_R, float))
        e, s = np.log10(saturated(experts_R, self.E_start, self.E_max)), math.log10(self.E_start)
        return 10 ** (
            (self.a * n + self.b * e + self.c * n * e - self.b * s) / (self.a + self.c * s)
        )

    @property
    def cutoff(self) -> float:
        """``N_cutoff = 10^(-b/c)``: from this size on more experts do not help.

        Infinite if experts help larger models at least as much as smaller ones (c <= 0); NaN for
        the reduced law.
        """
        if self.reduced:
            return math.nan
        exponent = -self.b / self.c if self.c > 0 else math.inf
        return 10.0**exponent if exponent < 300 else math.inf


PUBLISHED = {
    "S-Base": Law(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": Law(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "Hash": Law(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}
"""The paper's coefficients, as rounded in its table of them; ``PUBLISHED_CUTOFF`` belongs to the
unrounded ones."""

PUBLISHED_CUTOFF = {"S-Base": 937e9, "RL-R": 85e9, "Hash": 83e9}


def saturated(experts_R: Any, start: float, most: float) -> Reals:
    """Eh for the given numbers of experts."""
    return 1 / (1 / (np.asarray(experts_R, float) - 1 + _delta(start, most)) + 1 / most)


def _delta(start: float, most: float) -> float:
    return 1 / (1 / start - 1 / most)


def fit_law(size_R: Any, experts_R: Any, loss_R: Any, start: Law | None = None) -> Law:
    """The law with the smallest sum of squared errors of log10 L.

    Args:
      size_R: N of every run. If all are equal, the reduced law is fitted.
      experts_R: E of every run, 1 for a dense one.
      loss_R: its loss, positive.
      start: a law near the best one, such as that of almost the same runs; saves the search of a
        coarse grid.
    """
    problem = _Problem(size_R, experts_R, loss_R)
    if start is None:
        inner = min(_STARTS, key=lambda point: problem.at(np.array(point)).cost)
    else:
        inner = np.log([_delta(start.E_start, start.E_max), start.E_max])
    result = least_squares(
        lambda point: problem.at(point).error_R,
        np.clip(np.array(inner), LOWEST, HIGHEST),
        # SciPy's annotation of the Jacobian knows its names only.
        lambda point: problem.at(point).jacobian_R2,  # pyright: ignore[reportArgumentType]
        bounds=(LOWEST, HIGHEST),
        method="dogbox",
        ftol=_TOLERANCE,
        xtol=_TOLERANCE,
        gtol=_TOLERANCE,
    )
    best = problem.at(result.x)
    delta, most = np.exp(best.inner)
    linear = dict(zip(REDUCED if problem.reduced else FULL, best.linear_C.tolist(), strict=True))
    saturation = {"E_start": float(1 / (1 / delta + 1 / most)), "E_max": float(most)}
    return Law(**{"a": 0.0, "c": 0.0, **linear, **saturation}, reduced=problem.reduced)


def squared_error(law: Law, size_R: Any, experts_R: Any, loss_R: Any) -> float:
    """The objective of the fit: the sum over runs of (log10 of predicted over measured loss)^2."""
    return float(np.sum(np.log10(law.loss(size_R, experts_R) / np.asarray(loss_R, float)) ** 2))


@dataclasses.dataclass(frozen=True)
class _Point:
    """The best linear coefficients for one (ln delta, ln E_max)."""

    inner: Float[np.ndarray, "2"]
    linear_C: Float[np.ndarray, " C"]
    error_R: Reals
    jacobian_R2: Float[np.ndarray, "R 2"]

    @property
    def cost(self) -> float:
        return float(self.error_R @ self.error_R)


class _Problem:
    """The runs as a function of (ln delta, ln E_max)."""

    def __init__(self, size_R: Any, experts_R: Any, loss_R: Any) -> None:
        self.n_R = np.log10(np.asarray(size_R, float))
        self.experts_R = np.asarray(experts_R, float)
        self.target_R = np.log10(np.asarray(loss_R, float))
        self.reduced = bool(np.all(self.n_R == self.n_R[0]))

    def at(self, inner: Float[np.ndarray, "2"]) -> _Point:
        delta, most = np.exp(inner)
        shifted_R = self.experts_R - 1 + delta
        eh_R = 1 / (1 / shifted_R + 1 / most)
        e_R, one_R = np.log10(eh_R), np.ones_like(eh_R)
        columns = [e_R, one_R] if self.reduced else [self.n_R, e_R, self.n_R * e_R, one_R]
        q_RC, r_CC = np.linalg.qr(np.stack(columns, axis=1))
        # A pseudo-inverse: at the ends of the search Eh may be the same for all E.
        linear_C = np.linalg.lstsq(r_CC, q_RC.T @ self.target_R, rcond=None)[0]
        slope_R = linear_C[0] if self.reduced else linear_C[1] + linear_C[2] * self.n_R
        # d log10 Eh / d (ln delta, ln E_max), through the slope of log10 L in log10 Eh.
        change_R2 = np.stack([eh_R * delta / shifted_R**2, eh_R / most], axis=1) / math.log(10)
        moved_R2 = change_R2 * np.reshape(slope_R, (-1, 1))
        error_R = q_RC @ (r_CC @ linear_C) - self.target_R
        return _Point(inner, linear_C, error_R, moved_R2 - q_RC @ (q_RC.T @ moved_R2))
