"""The comparison of variants: means, differences to the baseline, costs, marks and verdicts."""

import dataclasses
import math
import statistics as plain
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax.sweep.definition import Sweep
from moejax.sweep.match import MATCHES, TOLERANCE
from moejax.sweep.results import Result, unit_of
from moejax.sweep.seed_variance import Detectable, detectable_difference, seed_variance
from moejax.sweep.statistics import (
    CONFIDENCE,
    LEVEL,
    POWER,
    Difference,
    Estimate,
    estimate,
    holm,
    outcome,
    paired,
    verdict,
)

FORMAT = 1
"""The version of summary.json."""
BASELINE = "baseline"
LEAK, MISSED, DIVERGED, UNFINISHED = "leak", "cost", "diverged", "unfinished"
"""A variant's marks: caveats that belong beside its numbers."""

COSTS: dict[str, Callable[[Result], float]] = {
    "active_flops": lambda result: result.train_flops_per_token,
    "total_params": lambda result: float(result.total_parameters),
    "step_time": lambda result: result.seconds_per_step,
}
"""The measured costs of a finished trial, in the units of ``MATCHES``."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished trial. Fields that need a baseline are None without one."""

    seed: int
    workdir: str
    loss: float
    difference: float | None
    cost: float | None
    cost_ratio: float | None
    missed_match: bool


@dataclasses.dataclass(frozen=True)
class Compared:
    """A variant, with the fields of summary.json (docs/sweeps.md)."""

    variant: str
    wanted: int
    seeds: tuple[int, ...]
    unfinished: tuple[int, ...]
    diverged: tuple[int, ...]
    mean: float | None
    half_width: float | None
    deviation: float | None
    difference: Difference | None
    p_holm: float | None
    outcome: str
    verdict: str
    cost: float | None
    cost_ratio: float | None
    missed_match: bool
    leak: str
    marks: tuple[str, ...]
    trials: tuple[Point, ...]
    by_source: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)
    """The loss on each source of a mixture, over the same seeds."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """A sweep's comparison. ``cost`` is the matched cost, or active FLOPs if none is matched;
    ``unit`` is the unit of the losses."""

    source: str
    baseline: str | None
    match: str | None
    cost: str
    unit: str
    detectable: Detectable | None
    variants: tuple[Compared, ...]

    def of(self, variant: str) -> Compared:
        return next(each for each in self.variants if each.variant == variant)


def compare(sweep: Sweep, results: Sequence[Result], diverged: set[tuple[str, int]]) -> Summary:
    """The comparison of finished trials; ``diverged`` has variant and seed of diverged ones.

    A trial whose last held-out loss is not finite has diverged, although it finished.
    """
    diverged = diverged | {(r.variant, r.seed) for r in results if not math.isfinite(r.loss)}
    results = [r for r in results if math.isfinite(r.loss)]
    baseline = sweep.comparison.baseline
    cost = sweep.comparison.match or "active_flops"
    own = {name: [r for r in results if r.variant == name] for name in sweep.variants}
    losses = {name: {r.seed: r.loss for r in finished} for name, finished in own.items()}
    reference = _mean([COSTS[cost](r) for r in own[baseline]]) if baseline else None
    differences = {
        name: paired(losses[name], losses[baseline])
        for name in sweep.variants
        if baseline and name != baseline
    }
    tested = {name: d.p for name, d in differences.items() if d and d.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    variants = []
    for name in sweep.variants:
        others = losses[baseline] if baseline and name != baseline else {}
        points = [_point(sweep, r, COSTS[cost](r), reference, others) for r in own[name]]
        lost = [seed for seed in _seeds(sweep, name) if (name, seed) in diverged]
        leak = own[name][0].leak if own[name] else ""
        decision = differences.get(name), corrected.get(name), unit_of(results)
        compared = _compared(sweep, name, points, lost, leak, *decision)
        variants.append(dataclasses.replace(compared, by_source=_by_source(own[name])))
    return Summary(
        source=sweep.source,
        baseline=baseline,
        match=sweep.comparison.match,
        cost=cost,
        unit=unit_of(results),
        detectable=detectable_difference(sweep, seed_variance(sweep, results)),
        variants=tuple(variants),
    )


def _by_source(results: Sequence[Result]) -> dict[str, Estimate]:
    """The losses on the sources that all these trials have."""
    names = [
        name
        for name in (results[0].loss_by_source if results else ())
        if all(name in result.loss_by_source for result in results)
    ]
    return {name: estimate([r.loss_by_source[name] for r in results]) for name in names}


def _seeds(sweep: Sweep, variant: str) -> list[int]:
    return [trial.seed for trial in sweep.trials if trial.variant == variant]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return plain.fmean(known) if known else None


def _point(
    sweep: Sweep,
    result: Result,
    cost: float,
    reference: float | None,
    baseline: Mapping[int, float],
) -> Point:
    """``reference`` is the baseline's mean cost, ``baseline`` its losses by seed."""
    ratio = cost / reference if reference and math.isfinite(cost) else None
    claims = sweep.comparison.match is not None and result.variant != sweep.comparison.baseline
    other = baseline.get(result.seed)
    return Point(
        seed=result.seed,
        workdir=f"trials/{result.variant}-seed{result.seed}",
        loss=result.loss,
        difference=None if other is None else result.loss - other,
        cost=cost if math.isfinite(cost) else None,
        cost_ratio=ratio,
        missed_match=claims and ratio is not None and abs(ratio - 1) > TOLERANCE,
    )


def _compared(
    sweep: Sweep,
    name: str,
    points: Sequence[Point],
    diverged: Sequence[int],
    leak: str,
    difference: Difference | None,
    p_holm: float | None,
    unit: str,
) -> Compared:
    wanted, seeds = _seeds(sweep, name), [point.seed for point in points]
    unfinished = [seed for seed in wanted if seed not in (*seeds, *diverged)]
    losses = estimate([point.loss for point in points]) if points else None
    missed = any(point.missed_match for point in points)
    holds = {LEAK: leak, MISSED: missed, DIVERGED: diverged, UNFINISHED: unfinished}
    return Compared(
        variant=name,
        wanted=len(wanted),
        seeds=tuple(seeds),
        unfinished=tuple(unfinished),
        diverged=tuple(diverged),
        mean=losses and losses.mean,
        half_width=losses and losses.half_width,
        deviation=losses and losses.deviation,
        difference=difference,
        p_holm=p_holm,
        outcome=BASELINE if name == sweep.comparison.baseline else outcome(difference, p_holm),
        verdict=_verdict(sweep, name, seeds, diverged, difference, p_holm, unit),
        cost=_mean([point.cost for point in points]),
        cost_ratio=_mean([point.cost_ratio for point in points]),
        missed_match=missed,
        leak=leak,
        marks=tuple(mark for mark, value in holds.items() if value),
        trials=tuple(points),
    )


def _verdict(
    sweep: Sweep,
    name: str,
    finished: Sequence[int],
    diverged: Sequence[int],
    difference: Difference | None,
    p_holm: float | None,
    unit: str,
) -> str:
    """The verdict, with the diverged seeds: without them the sample is biased."""
    baseline = sweep.comparison.baseline
    if baseline is None or name == baseline:
        text = BASELINE if baseline else ""
    else:
        text = verdict(difference, p_holm, unit) if finished else "no finished seed: no verdict"
    if not diverged:
        return text
    lost = f"{len(diverged)} diverged (seed {', '.join(map(str, diverged))})"
    return f"{text}; {lost}" if text else lost


def to_json(summary: Summary) -> dict[str, Any]:
    """The tree of summary.json."""
    detectable = summary.detectable
    return {
        "format": FORMAT,
        "experiment": summary.source,
        "baseline": summary.baseline,
        "match": summary.match,
        "tolerance": TOLERANCE,
        "confidence": CONFIDENCE,
        "unit": summary.unit,
        "cost": {"name": summary.cost, "unit": MATCHES[summary.cost]},
        "detectable": detectable
        and {**dataclasses.asdict(detectable), "power": POWER, "level": LEVEL},
        "variants": [_variant_to_json(variant) for variant in summary.variants],
    }


def _variant_to_json(variant: Compared) -> dict[str, Any]:
    tree = dataclasses.asdict(variant)
    if not variant.by_source:
        tree.pop("by_source")
    p_holm = tree.pop("p_holm")
    if tree["difference"]:
        tree["difference"]["p_holm"] = p_holm
    return tree
