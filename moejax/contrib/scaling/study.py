"""The study of a source's routers as values, for the table, the picture and JSON."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.contrib.scaling import checks
from moejax.contrib.scaling.checks import Errors, Interval, Prediction
from moejax.contrib.scaling.law import PUBLISHED, PUBLISHED_CUTOFF, Law
from moejax.contrib.scaling.order import Comparison, Ranking, comparisons, rankings, seed_deviation
from moejax.contrib.scaling.runs import DENSE, Run, Source
from moejax.errors import UserError, suggest

CUTOFF = "N_cutoff"
TOLERANCE = 0.02
"""A prediction within 2 % of the loss is a good one."""
SEED = 0
"""The seed of the bootstrap: the same runs give the same intervals."""


@dataclasses.dataclass(frozen=True)
class Effective:
    """The size of the dense model that is equivalent to ``size`` with ``experts``."""

    size: float
    experts: int
    value: float


@dataclasses.dataclass(frozen=True)
class RouterStudy:
    """One router's fit. Errors are of the loss, relative; None where nothing can be predicted."""

    router: str
    runs: tuple[Run, ...]
    law: Law
    intervals: dict[str, Interval]
    """95 % bootstrap intervals of the fitted coefficients, and of N_cutoff for the full law."""
    fitted: Errors
    cell: Errors | None
    """On (size, experts) cells held out one by one; likewise whole sizes, numbers of experts."""
    size: Errors | None
    experts: Errors | None
    missed: tuple[Prediction, ...]
    """Runs of held-out cells whose error exceeds `TOLERANCE`."""
    paper: Law | None
    paper_cutoff: float | None
    paper_errors: Errors | None
    effective: tuple[Effective, ...]
    """Each size with the most experts it was run with; of the full law only."""

    @property
    def coefficients(self) -> dict[str, float]:
        return coefficients(self.law)


@dataclasses.dataclass(frozen=True)
class Study:
    source: Source
    routers: tuple[RouterStudy, ...]
    rankings: tuple[Ranking, ...]
    """Cells that have all the studied routers, if there are several."""
    pairs: dict[tuple[str, str], list[Comparison]]
    noise: tuple[float, int]
    """`seed_deviation` of the runs."""


def coefficients(law: Law) -> dict[str, float]:
    """The fitted coefficients by name, with N_cutoff if the law has one."""
    values = {name: float(getattr(law, name)) for name in law.names}
    return values if law.reduced else {**values, CUTOFF: law.cutoff}


def make_study(source: Source, routers: Sequence[str] = (), resamples: int = 1000) -> Study:
    """Fit every router, or those named, and check the fits.

    Raises:
      UserError: an unknown router, or one with too few runs.
    """
    for name in routers:
        if name not in source.routers:
            raise UserError(
                f"--router={name} is not in {source.name}; " + suggest(name, source.routers)
            )
    chosen = list(dict.fromkeys(routers)) or source.routers
    if not chosen:
        raise UserError(f"{source.name} has no runs with experts, so there is no law to fit")
    for name in chosen:
        checks.check_enough(name, source.of(name))
    studies = tuple(_study(source, name, resamples) for name in chosen)
    runs = [run for run in source.runs if run.router in (*chosen, DENSE)]
    ranked = rankings(runs, chosen) if len(chosen) > 1 else []
    compared = {pair: comparisons(runs, *pair) for pair in itertools.combinations(chosen, 2)}
    return Study(source, studies, tuple(ranked), compared, seed_deviation(runs))


def _study(source: Source, router: str, resamples: int) -> RouterStudy:
    runs = source.of(router)
    law = checks.fit_runs(runs)
    laws = checks.resampled_laws(runs, law, resamples, np.random.default_rng(SEED))
    drawn = [coefficients(law) for law in laws]
    cell, size, experts = (
        checks.held_out(runs, law, group) for group in (checks.CELL, checks.SIZE, checks.EXPERTS)
    )
    paper = PUBLISHED.get(router) if source.published and not law.reduced else None
    sizes = [] if law.reduced else sorted({run.size for run in runs if run.experts > 1})
    most = {n: max(run.experts for run in runs if run.size == n) for n in sizes}
    return RouterStudy(
        router=router,
        runs=tuple(runs),
        law=law,
        intervals={n: checks.interval([values[n] for values in drawn]) for n in coefficients(law)},
        fitted=checks.errors(checks.predict(law, runs)),
        cell=checks.errors(cell) if cell else None,
        size=checks.errors(size) if size else None,
        experts=checks.errors(experts) if experts else None,
        missed=tuple(prediction for prediction in cell if abs(prediction.error) > TOLERANCE),
        paper=paper,
        paper_cutoff=PUBLISHED_CUTOFF[router] if paper else None,
        paper_errors=checks.errors(checks.predict(paper, runs)) if paper else None,
        effective=tuple(Effective(n, e, float(law.effective_size(n, e))) for n, e in most.items()),
    )


def as_json(study: Study) -> dict[str, Any]:
    """The study as JSON types. Infinite and undetermined values are null."""
    source = study.source
    content = {
        "source": source.name,
        "unit": source.unit,
        "notes": list(source.notes),
        "tolerance": TOLERANCE,
        "routers": {each.router: _router_json(each) for each in study.routers},
        "order": [
            {"size": r.cell[0], "experts": r.cell[1], "order": list(r.order)}
            for r in study.rankings
        ],
        "pairs": [
            {
                "first": first,
                "second": second,
                "cells": [
                    {
                        "size": c.cell[0],
                        "experts": c.cell[1],
                        "difference": c.mean,
                        "half_width": c.half_width,
                        "seeds": c.seeds,
                    }
                    for c in compared
                ],
            }
            for (first, second), compared in study.pairs.items()
        ],
    }
    return _finite(content)


def _router_json(study: RouterStudy) -> dict[str, Any]:
    paper = coefficients(study.paper) | {CUTOFF: study.paper_cutoff} if study.paper else None
    kinds = ("fitted", "cell", "size", "experts", "paper_errors")
    errors = {kind: getattr(study, kind) for kind in kinds}
    return {
        "law": "reduced" if study.law.reduced else "full",
        "coefficients": {
            name: {
                "value": value,
                "low": study.intervals[name][0],
                "high": study.intervals[name][1],
            }
            for name, value in study.coefficients.items()
        },
        "at_bound": list(study.law.at_bound),
        "errors": {kind: dataclasses.asdict(e) if e else None for kind, e in errors.items()},
        "missed": [
            {**dataclasses.asdict(p.run), "predicted": p.loss, "error": p.error}
            for p in study.missed
        ],
        "paper": paper,
        "effective": [dataclasses.asdict(each) for each in study.effective],
        "runs": [dataclasses.asdict(run) for run in study.runs],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
