"""The variance over seeds, from a pilot or the sweep itself, and the detectable difference."""

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
"""Degrees of freedom above which paired differences are preferred to more unpaired seeds."""

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
class SeedVariance:
    """The standard deviation of the difference of two variants at equal seeds."""

    deviation: float
    paired: bool
    """False: s sqrt(2) from the deviation s over seeds, which is right if pairing does not help."""
    freedom: int
    """Degrees of freedom of the deviation; 0 for a number given by the user."""
    source: str
    """The data behind it, in words."""


@dataclasses.dataclass(frozen=True)
class Detectable:
    """The smallest true difference that a paired t-test detects in 80 % of sweeps, at level 5 %.

    ``difference_holm`` is the same quantity at Holm's first-step level, 5 % over ``comparisons``.
    ``factors`` are the ends of the deviation's 95 % interval relative to its estimate, and so of
    both differences; None where the deviation is a given number and ``freedom`` is 0.
    """

    difference: float
    difference_holm: float
    seeds: int
    comparisons: int
    deviation: float
    freedom: int
    factors: tuple[float, float] | None
    source: str


def seed_variance(sweep: Sweep, finished: Sequence[Result]) -> SeedVariance | None:
    """The best estimate from the sweep's own trials and its PILOT; None if there is none.

    Raises:
      UserError: the pilot's file cannot be read.
    """
    baseline, pilot = sweep.comparison.baseline, sweep.comparison.pilot
    variances = estimates(losses_of(finished), baseline, "this sweep")
    if isinstance(pilot, str):
        variances += estimates(losses_of(read_pilot(pilot)), baseline, pilot)
    elif pilot is not None:
        text = f"PILOT = {pilot:g}, the deviation over seeds, times \N{SQUARE ROOT}2"
        variances.append(SeedVariance(math.sqrt(2) * pilot, False, 0, text))
    return best(variances)


def best(variances: Sequence[SeedVariance]) -> SeedVariance | None:
    """The most reliable estimate: more degrees of freedom are better.

    Paired differences are preferred to the deviation over seeds, unless they have fewer than
    `ENOUGH` degrees of freedom and the seeds have more: with a single degree of freedom an estimate
    can be wrong by a factor of 30.
    """
    by_freedom = sorted(variances, key=lambda each: each.freedom, reverse=True)
    paired = next((each for each in by_freedom if each.paired), None)
    if paired and (paired.freedom >= ENOUGH or paired.freedom == by_freedom[0].freedom):
        return paired
    return next(iter(by_freedom), None)


def estimates(losses: Losses, baseline: str | None, where: str) -> list[SeedVariance]:
    """The pooled estimates from paired differences to the baseline and from seeds.

    If the baseline has no losses, the first variant takes its place.
    """
    reference = baseline if baseline in losses else next(iter(losses), None)
    if reference is None:
        return []
    variances = []
    pairs = [
        [loss - losses[reference][seed] for seed, loss in own.items() if seed in losses[reference]]
        for variant, own in losses.items()
        if variant != reference
    ]
    deviation, freedom = _pooled(pairs)
    if freedom:
        count = freedom + sum(len(differences) > 1 for differences in pairs)
        text = f"{count} differences to {reference} in {where}"
        variances.append(SeedVariance(deviation, True, freedom, text))
    deviation, freedom = _pooled([list(own.values()) for own in losses.values()])
    if freedom:
        text = f"the deviation over seeds in {where}, {deviation:.2g}, times \N{SQUARE ROOT}2"
        variances.append(SeedVariance(math.sqrt(2) * deviation, False, freedom, text))
    return variances


def _pooled(groups: Iterable[list[float]]) -> tuple[float, int]:
    """The pooled standard deviation within groups, and its degrees of freedom."""
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def losses_of(trials: Sequence[Result | Pilot]) -> Losses:
    """The finite losses: the others give no variance over seeds."""
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
            f"{path} was not written by this version of `moejax sweep` ({error}); name another "
            "PILOT, or run that sweep's command again"
        ) from error


def detectable_difference(sweep: Sweep, variance: SeedVariance | None) -> Detectable | None:
    """The difference that the sweep can detect; None for one seed or variant, or no estimate."""
    seeds = {
        variant: {trial.seed for trial in sweep.trials if trial.variant == variant}
        for variant in sweep.variants
    }
    reference = sweep.comparison.baseline or sweep.variants[0]
    common = [len(own & seeds[reference]) for name, own in seeds.items() if name != reference]
    if variance is None or not common or min(common) < 2:
        return None
    least, many = min(common), len(common)
    return Detectable(
        difference=variance.deviation * detectable(least),
        difference_holm=variance.deviation * detectable(least, LEVEL / many),
        seeds=least,
        comparisons=many,
        deviation=variance.deviation,
        freedom=variance.freedom,
        factors=deviation_factors(variance.freedom) if variance.freedom else None,
        source=variance.source,
    )
