"""Checks of a fit: intervals of its coefficients and errors on held-out runs."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import numpy as np

from moejax.contrib.scaling.law import FULL, REDUCED, SATURATION, Law, Reals, fit_law
from moejax.contrib.scaling.runs import Run
from moejax.errors import UserError

LEAST_CELLS = {"full": 8, "reduced": 5}
"""Distinct (size, experts) that a fit needs: two more than the full law has coefficients, and one
more than the reduced law, so that degrees of freedom remain."""
LEAST_EXPERTS = 4

Interval: TypeAlias = tuple[float, float]
Coverage: TypeAlias = Callable[[Run], Hashable]

CELL: Coverage = lambda run: run.cell
SIZE: Coverage = lambda run: run.size
EXPERTS: Coverage = lambda run: run.experts


def fit_runs(runs: Sequence[Run], start: Law | None = None) -> Law:
    return fit_law(*arrays(runs), start=start)


def arrays(runs: Sequence[Run]) -> tuple[Reals, Reals, Reals]:
    """Sizes, numbers of experts and losses."""
    columns = zip(*((run.size, run.experts, run.loss) for run in runs), strict=True)
    size_R, experts_R, loss_R = (np.array(column, float) for column in columns)
    return size_R, experts_R, loss_R


def check_enough(router: str, runs: Sequence[Run]) -> None:
    """Check that the runs can determine the law.

    Raises:
      UserError: naming how many there are and how many are needed.
    """
    cells, experts = {run.cell for run in runs}, {run.experts for run in runs}
    law = "full" if len({run.size for run in runs}) > 1 else "reduced"
    if len(cells) < LEAST_CELLS[law] or len(experts) < LEAST_EXPERTS:
        raise UserError(
            f"{router}: {len(cells)} distinct (size, experts) with {len(experts)} numbers of "
            f"experts; the {law} law needs {LEAST_CELLS[law]} with {LEAST_EXPERTS}: train more of "
            "them (dense models count as E=1), or leave this router out with --router"
        )


def determined(runs: Sequence[Run], reduced: bool) -> bool:
    """True if these runs of a router determine each coefficient of the law fitted to all."""
    coefficients = len(REDUCED if reduced else FULL) + len(SATURATION)
    sizes, experts = {run.size for run in runs}, {run.experts for run in runs}
    enough = reduced or len(sizes) > 1
    return enough and len(experts) > 2 and len({run.cell for run in runs}) >= coefficients


def resampled_laws(
    runs: Sequence[Run], law: Law, resamples: int, rng: np.random.Generator
) -> list[Law]:
    """Laws fitted to runs drawn with replacement, as many as there are (Efron's bootstrap).

    A draw that leaves a coefficient undetermined is drawn again.
    """
    laws = []
    while len(laws) < resamples:
        drawn = [runs[i] for i in rng.integers(0, len(runs), len(runs))]
        if determined(drawn, law.reduced):
            laws.append(fit_runs(drawn, start=law))
    return laws


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The 2.5 % and 97.5 % percentiles; they may be infinite."""
    # Order statistics, not interpolated: a cutoff may be infinite in some resamples.
    ends = (0.5 - level / 2, 0.5 + level / 2)
    low, high = np.quantile(np.asarray(values, float), ends, method="nearest")
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A run's loss and its prediction by a law that was fitted without it."""

    run: Run
    loss: float

    @property
    def error(self) -> float:
        """Relative: 0.02 is a prediction 2 % too high."""
        return self.loss / self.run.loss - 1


def held_out(runs: Sequence[Run], law: Law, group: Coverage) -> list[Prediction]:
    """Each group of runs predicted by the law fitted to the others (cross-validation).

    Args:
      runs: a router's, with the dense ones.
      law: the law fitted to all of them, from which the searches start.
      group: the runs left out together: `CELL`, so that no other seed of a held-out run is used,
        `SIZE` (all runs of a size), `EXPERTS` (all runs of a number of experts).

    Returns:
      A prediction per run of those groups without which the law is still determined.
    """
    predictions = []
    for key in dict.fromkeys(map(group, runs)):
        fitted = [run for run in runs if group(run) != key]
        if determined(fitted, law.reduced):
            hidden = [run for run in runs if group(run) == key]
            predictions += predict(fit_runs(fitted, start=law), hidden)
    return predictions


def predict(law: Law, runs: Sequence[Run]) -> list[Prediction]:
    size_R, experts_R, _ = arrays(runs)
    losses = law.loss(size_R, experts_R).tolist()
    return [Prediction(run, loss) for run, loss in zip(runs, losses, strict=True)]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Predictions in two numbers: mean and largest |predicted / measured - 1|."""

    mean: float
    largest: float
    runs: int


def errors(predictions: Sequence[Prediction]) -> Errors:
    """The errors of at least one prediction."""
    sizes = [abs(prediction.error) for prediction in predictions]
    return Errors(float(np.mean(sizes)), max(sizes), len(sizes))
