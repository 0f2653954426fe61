"""The order of routers by loss, cell by cell, and its certainty.

A cell is one size and one number of experts above 1. Two runs with the same seed see the same data
in the same order, so routers are compared by the differences of their runs of one seed.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from moejax.contrib.scaling.runs import DENSE, Run
from moejax.sweep.statistics import CONFIDENCE, critical, paired

Cell = tuple[float, int]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The routers of one cell by their mean loss, lowest first."""

    cell: Cell
    order: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Loss of the first router minus the second's in one cell, ``mean`` +- ``half_width``.

    The interval is infinite if the variance over seeds is unknown.
    """

    cell: Cell
    mean: float
    half_width: float
    seeds: int

    @property
    def sign(self) -> int:
        """-1: the first is lower; 1: higher; 0: the interval contains 0."""
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))

    def __neg__(self) -> "Comparison":
        """The second router against the first."""
        return dataclasses.replace(self, mean=-self.mean)


def rankings(runs: Sequence[Run], routers: Sequence[str]) -> list[Ranking]:
    """The order in each cell that has a run of every router; by size, then experts."""
    losses = _by_cell(runs)
    ranked = []
    for cell in sorted({cell for cell, _ in losses}):
        if all((cell, router) in losses for router in routers):
            means = {r: float(np.mean(list(losses[cell, r].values()))) for r in routers}
            ranked.append(Ranking(cell, tuple(sorted(routers, key=means.__getitem__))))
    return ranked


def exceptions(ranked: Sequence[Ranking], order: Sequence[str]) -> list[Ranking]:
    """The cells in which the routers are not in this order (lowest loss first)."""
    return [ranking for ranking in ranked if ranking.order != tuple(order)]


def comparisons(runs: Sequence[Run], first: str, second: str) -> list[Comparison]:
    """``first`` against ``second`` in each cell that both have with a seed in common.

    With several common seeds the interval is Student's for the paired differences. With one, it is
    that of a difference of two runs with the deviation `seed_deviation`.
    """
    losses, (noise, freedom) = _by_cell(runs), seed_deviation(runs)
    alone = critical(CONFIDENCE, freedom) * noise * math.sqrt(2) if freedom else math.inf
    compared = []
    for cell in sorted({cell for cell, _ in losses}):
        difference = paired(losses.get((cell, first), {}), losses.get((cell, second), {}))
        if difference:
            half_width = alone if difference.half_width is None else difference.half_width
            compared.append(Comparison(cell, difference.mean, half_width, len(difference.seeds)))
    return compared


def seed_deviation(runs: Sequence[Run]) -> tuple[float, int]:
    """Standard deviation of the loss over seeds, pooled over all cells with several seeds.

    Returns:
      The deviation and its degrees of freedom; (nan, 0) without such a cell.
    """
    groups: dict[tuple[str, Cell], list[float]] = defaultdict(list)
    for run in runs:
        groups[run.router, run.cell].append(run.loss)
    squares = sum(float(np.var(losses)) * len(losses) for losses in groups.values())
    freedom = sum(len(losses) - 1 for losses in groups.values())
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def _by_cell(runs: Sequence[Run]) -> dict[tuple[Cell, str], dict[int, float]]:
    """Loss by seed of each cell and router. E = 1 has nothing to route."""
    losses: dict[tuple[Cell, str], dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.router != DENSE and run.experts > 1:
            losses[run.cell, run.router][run.seed] = run.loss
    return dict(losses)
