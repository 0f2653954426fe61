"""The contents of a sweep's pictures: points, intervals, labels and axes, for any renderer.

``sweep.png`` (`figure`) and the report's pages draw what this module computes from the tree of
summary.json, so the two cannot disagree.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moejax.train import scales

LEAKS, MISSED = "\N{DAGGER}", "\N{DOUBLE DAGGER}"
LOG_FROM = 3.0
"""A cost axis is logarithmic if its largest value is this many times its smallest."""
COST_SPAN = 0.1
"""The least span of a linear cost axis, relative to the largest cost."""
COST_MARGIN = 0.15
"""Room for labels at each end of a cost axis, relative to its range."""
REACH = 1.0
"""Intervals are shown up to this many ranges of the points below and above them."""


class Interval(NamedTuple):
    """A mean with the half width of its 95 % interval, which a single seed does not have."""

    mean: float
    half_width: float | None

    @property
    def ends(self) -> tuple[float, ...]:
        half = self.half_width
        return () if half is None else (self.mean - half, self.mean + half)


@dataclasses.dataclass(frozen=True)
class Seed:
    """A finished trial as a point."""

    seed: int
    loss: float
    cost: float | None
    difference: float | None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A variant with at least one finite loss."""

    variant: str
    label: str
    """The name with its marks."""
    leaks: bool
    missed_match: bool
    loss: Interval
    difference: Interval | None
    cost: float | None
    outcome: str
    seeds: tuple[Seed, ...]

    @property
    def marked(self) -> bool:
        """True if it has a mark, and so an open symbol."""
        return self.leaks or self.missed_match

    @property
    def symbol(self) -> str:
        """The shape of its points: "diamond" if it leaks, "square" if it misses the match."""
        return "diamond" if self.leaks else "square" if self.missed_match else "circle"


class Axis(NamedTuple):
    """The range of an axis, and the labels of variants whose intervals are cut off by it."""

    low: float
    high: float
    cut: tuple[str, ...] = ()
    log: bool = False


def marks(variant: Mapping[str, Any]) -> str:
    """The marks of one of summary.json's variants: it leaks, or misses the matched cost."""
    return LEAKS * bool(variant["leak"]) + MISSED * bool(variant["missed_match"])


def drawn_variants(summary: Mapping[str, Any]) -> list[Drawn]:
    """The variants that have a mean, in the sweep's order."""
    return [_drawn(each) for each in summary["variants"] if _finite(each["mean"])]


def _drawn(variant: Mapping[str, Any]) -> Drawn:
    difference = variant.get("difference")
    return Drawn(
        variant=variant["variant"],
        label=f"{variant['variant']} {marks(variant)}".strip(),
        leaks=bool(variant["leak"]),
        missed_match=bool(variant["missed_match"]),
        loss=Interval(variant["mean"], variant.get("half_width")),
        difference=difference and Interval(difference["mean"], difference.get("half_width")),
        cost=variant["cost"],
        outcome=variant.get("outcome", ""),
        seeds=tuple(
            Seed(trial["seed"], trial["loss"], trial["cost"], trial.get("difference"))
            for trial in variant["trials"]
            if _finite(trial["loss"])
        ),
    )


def with_costs(variants: Iterable[Drawn], costs: Mapping[tuple[str, int], float]) -> list[Drawn]:
    """The variants at other costs, given by variant and seed; a cost that is not finite is None."""
    priced = []
    for variant in variants:
        seeds = tuple(
            dataclasses.replace(seed, cost=cost if _finite(cost) else None)
            for seed in variant.seeds
            for cost in (costs.get((variant.variant, seed.seed)),)
        )
        known = [seed.cost for seed in seeds if seed.cost is not None]
        mean = sum(known) / len(known) if known else None
        priced.append(dataclasses.replace(variant, cost=mean, seeds=seeds))
    return priced


def least_span(variants: Iterable[Drawn], unit: str) -> float:
    """The least span of an axis of these variants' losses."""
    return scales.least_loss(unit, (variant.loss.mean for variant in variants))


def loss_axis(variants: Sequence[Drawn], unit: str) -> Axis:
    """The axis of losses: all seeds, and intervals as far as `REACH`."""
    points = [seed.loss for variant in variants for seed in variant.seeds]
    intervals = {variant.label: variant.loss for variant in variants}
    return _axis(points, intervals, least_span(variants, unit))


def difference_axis(variants: Sequence[Drawn], unit: str) -> Axis:
    """The axis of differences to the baseline, with 0 on it."""
    intervals = {each.label: each.difference for each in variants if each.difference}
    points = [seed.difference for each in variants for seed in each.seeds]
    means = [interval.mean for interval in intervals.values()]
    known = [0.0, *means, *(point for point in points if point is not None)]
    return _axis(known, intervals, least_span(variants, unit))


def _axis(points: Sequence[float], intervals: Mapping[str, Interval], least: float) -> Axis:
    if not points:
        return Axis(*scales.span((), least))
    low, high = min(points), max(points)
    reach = REACH * max(high - low, least)
    ends = [end for interval in intervals.values() for end in interval.ends]
    shown = [min(max(end, low - reach), high + reach) for end in ends]
    low, high = scales.span([*points, *shown], least)
    cut = [
        label
        for label, interval in intervals.items()
        if any(not low <= end <= high for end in interval.ends)
    ]
    return Axis(low, high, tuple(cut))


def cost_axis(variants: Iterable[Drawn]) -> Axis:
    """The axis of costs, logarithmic where they are far apart."""
    costs = [seed.cost for each in variants for seed in each.seeds if seed.cost is not None]
    if not costs:
        return Axis(0.0, 1.0)
    low, high = min(costs), max(costs)
    if high >= LOG_FROM * low > 0:
        room = (high / low) ** COST_MARGIN
        return Axis(low / room, high * room, log=True)
    room = max(COST_MARGIN * (high - low), (COST_SPAN * abs(high) - (high - low)) / 2)
    return Axis(low - room, high + (room or 1.0))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
