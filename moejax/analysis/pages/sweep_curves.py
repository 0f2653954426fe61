"""Metrics of every variant over steps: mean over seeds, its 95 % interval, and every seed."""

from collections.abc import Sequence

import numpy as np

from moejax.analysis import figures
from moejax.analysis.page import Block, Choice, Figure, Page
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.sweep.statistics import estimate

METRICS = {
    "held-out loss": ("eval", "loss", "nats per token"),
    "training loss": ("train", "loss", "nats per token"),
    "gradient norm": ("train", "grad_norm", "norm before clipping"),
    "imbalance": ("train", "moe/max_vio", "max load / mean load - 1"),
    "drops": ("train", "moe/drop_rate", "share of pairs dropped in training"),
}
SETTLED = 25
DASHES = ("solid", "dash", "dot", "dashdot")


def page(sweep: SweepData) -> Page:
    options: dict[str, list[Block]] = {}
    for name, (split, key, unit) in METRICS.items():
        figure = _figure(sweep, name, split, key, unit)
        if figure:
            options[name] = [figure]
    return Page("Curves", [Choice("metric", dict(options))] if options else [])


def _figure(sweep: SweepData, name: str, split: str, key: str, unit: str) -> Figure | None:
    bands, seeds, means, shown = [], [], [], []
    for index, variant in enumerate(sweep.variants):
        curves = [run.series(split, key) for run in sweep.runs(variant)]
        curves = [curve for curve in curves if len(curve[0])]
        if not curves:
            continue
        style = {"legendgroup": variant, "line": _style(index)}
        steps, mean, half = mean_curve(curves)
        means.append(figures.line(variant, steps, mean, **style))
        shown += [*mean[len(mean) // SETTLED :]]
        if len(curves) > 1:
            bands.append(_band(variant, index, steps, mean, half))
            thin = {**style, "line": {**_style(index), "width": 0.8}, "mode": "lines"}
            for run, (x, y) in zip(sweep.runs(variant), curves, strict=False):
                label = f"{variant}, seed {run.field('train.seed', '?')}"
                seeds.append(figures.line(label, x, y, **thin, opacity=0.55, showlegend=False))
    finite = [value for value in shown if np.isfinite(value)]
    if not finite:
        return None
    margin = 0.08 * (max(finite) - min(finite)) or 0.1
    axis = {"range": [min(finite) - margin, max(finite) + margin]}
    spec = figures.chart([*bands, *seeds, *means], "step", unit, yaxis=axis, showlegend=True)
    caption = (
        "Mean over the seeds of each variant (thick), every seed (thin) and the 95 % interval of "
        "the mean (shaded; Student's t, so that two seeds have a very wide one). A click on a name "
        "hides its variant, a double click all others. Finished trials only."
    )
    return Figure(spec, caption, height=480, name=f"curves-{name}")


def mean_curve(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all curves have, their mean there and the half width of its 95 % interval."""
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
    tables = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in curves]
    found = [estimate([table[step] for table in tables]) for step in common]
    half = [np.nan if e.half_width is None else e.half_width for e in found]
    return np.asarray(common), np.asarray([e.mean for e in found]), np.asarray(half)


def _style(index: int) -> dict[str, object]:
    return {"color": f"C{index % 8}", "dash": DASHES[index // 8 % len(DASHES)], "width": 2.2}


def _band(
    variant: str, index: int, steps: np.ndarray, mean: np.ndarray, half: np.ndarray
) -> figures.Spec:
    return {
        "type": "scatter",
        "name": figures.plain(variant),
        "x": [*steps.tolist(), *steps[::-1].tolist()],
        "y": [*(mean + half).tolist(), *(mean - half)[::-1].tolist()],
        "fill": "toself",
        "fillcolor": f"C{index % 8}",
        "line": {"width": 0},
        "mode": "lines",
        "opacity": 0.13,
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": variant,
    }


def variants_with_experts(sweep: SweepData) -> dict[str, list[RunData]]:
    """The finished runs of each variant that has any with experts."""
    found = {v: [run for run in sweep.runs(v) if run.has_experts] for v in sweep.variants}
    return {variant: runs for variant, runs in found.items() if runs}
