"""How much seeds vary, from a pilot or from the trials at hand, and what that lets a sweep find."""

import csv
import dataclasses
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moejax.errors import UserError
from moejax.sweep.definition import Sweep
from moejax.sweep.results import Result
from moejax.sweep.statistics import LEVEL, detectable, deviation_factors

ENOUGH = 4
"""Degrees of freedom from which paired differences are preferred to more seeds without pairs."""

Losses = Mapping[str, Mapping[int, float]]
"""Held-out losses by variant and seed."""


class Pilot(NamedTuple):
    """A finished trial of an earlier sweep, from its results.csv."""

    variant: str
    seed: int
    step: int
    loss: float
    seconds_per_step: float
    elapsed_seconds: float


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation of the difference of two variants at equal seeds, and where it is from."""

    deviation: float
    paired: bool
    """False: from the deviation s over seeds as s sqrt(2), which is right if pairing is no help."""
    freedom: int
    """Of the deviation; 0 for a number that was given."""
    source: str


@dataclasses.dataclass(frozen=True)
class Detectable:
    """The smallest true difference that a paired t-test finds in 80 % of sweeps, at the 5 % level.

    ``difference_holm`` is it at the level of Holm's first step, 5 % over ``comparisons``.
    ``factors`` are the ends of the 95 % interval of the deviation over it, and so of both
    differences; None where the deviation is a given number and ``freedom`` 0.
    """

    difference: float
    difference_holm: float
    seeds: int
    comparisons: int
    deviation: float
    freedom: int
    factors: tuple[float, float] | None
    source: str


def noise(sweep: Sweep, finished: Sequence[Result]) -> Noise | None:
    """The best of what the sweep's own trials and its PILOT tell; None if they tell nothing.

    Raises:
      UserError: the pilot's file cannot be read.
    """
    baseline, pilot = sweep.comparison.baseline, sweep.comparison.pilot
    found = known(losses_of(finished), baseline, "this sweep")
    if isinstance(pilot, str):
        found += known(losses_of(read_pilot(pilot)), baseline, pilot)
    elif pilot is not None:
        text = f"PILOT = {pilot:g}, the deviation over seeds, times \N{SQUARE ROOT}2"
        found.append(Noise(math.sqrt(2) * pilot, False, 0, text))
    return best(found)


def best(found: Sequence[Noise]) -> Noise | None:
    """The one to rely on: many degrees of freedom are better than few.

    Differences at equal seeds are better than the deviation over seeds, unless they are both few
    and fewer: one of one degree of freedom is wrong by a factor of 30 now and then.
    """
    by_freedom = sorted(found, key=lambda each: each.freedom, reverse=True)
    paired = next((each for each in by_freedom if each.paired), None)
    if paired and (paired.freedom >= ENOUGH or paired.freedom == by_freedom[0].freedom):
        return paired
    return next(iter(by_freedom), None)


def known(losses: Losses, baseline: str | None, where: str) -> list[Noise]:
    """What losses tell: of the differences to the baseline, and of seeds, each pooled.

    Without a baseline among them the first variant is in its place.
    """
    reference = baseline if baseline in losses else next(iter(losses), None)
    if reference is None:
        return []
    found = []
    pairs = [
        [loss - losses[reference][seed] for seed, loss in own.items() if seed in losses[reference]]
        for variant, own in losses.items()
        if variant != reference
    ]
    deviation, freedom = _pooled(pairs)
    if freedom:
        count = freedom + sum(len(differences) > 1 for differences in pairs)
        text = f"{count} differences to {reference} in {where}"
        found.append(Noise(deviation, True, freedom, text))
    deviation, freedom = _pooled([list(own.values()) for own in losses.values()])
    if freedom:
        text = f"the deviation over seeds in {where}, {deviation:.2g}, times \N{SQUARE ROOT}2"
        found.append(Noise(math.sqrt(2) * deviation, False, freedom, text))
    return found


def _pooled(groups: Iterable[list[float]]) -> tuple[float, int]:
    """Standard deviation within groups, and its degrees of freedom."""
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def losses_of(trials: Sequence[Result | Pilot]) -> Losses:
    """Those that are finite: the others say nothing of how much seeds vary."""
    losses: dict[str, dict[int, float]] = {}
    for trial in filter(lambda trial: math.isfinite(trial.loss), trials):
        losses.setdefault(trial.variant, {})[trial.seed] = trial.loss
    return losses


def read_pilot(folder: str) -> list[Pilot]:
    """The finished trials of a sweep, from its results.csv.

    Raises:
      UserError: it cannot be read.
    """
    path = Path(os.path.expanduser(folder)) / "results.csv"
    kinds = Pilot.__annotations__
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                Pilot(**{name: kind(row[name]) for name, kind in kinds.items()})
                for row in csv.DictReader(file)
                if row["finished"] == "1"
            ]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not what this version of `moejax sweep` writes ({error}); name another "
            "PILOT, or run that sweep's command again"
        ) from error


def detectable_difference(sweep: Sweep, found: Noise | None) -> Detectable | None:
    """What the sweep's seeds can tell apart; None for one seed, one variant or unknown noise."""
    seeds = {
        variant: {trial.seed for trial in sweep.trials if trial.variant == variant}
        for variant in sweep.variants
    }
    reference = sweep.comparison.baseline or sweep.variants[0]
    common = [len(own & seeds[reference]) for name, own in seeds.items() if name != reference]
    if found is None or not common or min(common) < 2:
        return None
    least, many = min(common), len(common)
    return Detectable(
        difference=found.deviation * detectable(least),
        difference_holm=found.deviation * detectable(least, LEVEL / many),
        seeds=least,
        comparisons=many,
        deviation=found.deviation,
        freedom=found.freedom,
        factors=deviation_factors(found.freedom) if found.freedom else None,
        source=found.source,
    )
