"""How each variant of a sweep came out."""

import statistics
from typing import Any

from moejax.analysis.sweep import SweepData
from moejax.sweep.statistics import estimate

Outcome = dict[str, Any]
"""One of the ``variants`` of summary.json (docs/sweeps.md)."""


def outcomes(sweep: SweepData) -> list[Outcome]:
    """Those of summary.json; without it, means and intervals of the trials that are there."""
    if sweep.summary:
        return sweep.summary["variants"]
    found = []
    for variant in sweep.variants:
        results = [result for result in sweep.results if result.variant == variant]
        about = estimate([result.loss for result in results]) if results else None
        costs = [result.train_flops_per_token for result in results]
        found.append(
            {
                "variant": variant,
                "seeds": [result.seed for result in results],
                "wanted": sum(trial.variant == variant for trial in sweep.trials),
                "mean": about and about.mean,
                "half_width": about and about.half_width,
                "cost": statistics.fmean(costs) if costs else None,
                "leak": results[0].leak if results else "",
                "trials": [
                    {"seed": r.seed, "loss": r.loss, "cost": r.train_flops_per_token}
                    for r in results
                ],
            }
        )
    return found


def interval(value: dict[str, Any]) -> str:
    """``mean ± half width`` of the 95 % interval, of a dict with both."""
    half = value.get("half_width")
    return f"{value['mean']:.4f}" + (f" ± {half:.4f}" if half is not None else " (one seed)")
