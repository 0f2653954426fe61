"""An interval for any statistic of a text's rows."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

GROUPS = 20
_STUDENT = 2.093
"""The 97.5% quantile of Student's t with GROUPS - 1 degrees of freedom."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def jackknife(value: float, without_G: Float[np.ndarray, " G"]) -> Interval:
    r"""95% interval of a statistic from its values without each of G equal groups of rows.

    .. math:: s^2 = \frac{G - 1}{G} \sum_g (\theta_g - \bar\theta)^2, \quad \theta \pm t_{G-1} s

    The delete-a-group jackknife: rows are independent, tokens within a row are not. NaN where any
    value is.
    """
    spread = (len(without_G) - 1) / len(without_G) * np.sum((without_G - without_G.mean()) ** 2)
    half = _STUDENT * float(np.sqrt(spread))
    return Interval(value, value - half, value + half)


def over_rows(rows: int, statistic: Callable[[np.ndarray], float]) -> Interval:
    """The interval of a function of the chosen rows' numbers.

    Groups are neighbours, because neighbouring rows come from the same document.

    Raises:
      ValueError: fewer rows than `GROUPS`.
    """
    if rows < GROUPS:
        raise ValueError(f"{rows} rows cannot make {GROUPS} groups")
    row_N = np.arange(rows)
    group_N = row_N * GROUPS // rows
    without = [statistic(row_N[group_N != group]) for group in range(GROUPS)]
    return jackknife(statistic(row_N), np.array(without))
