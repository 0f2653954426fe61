"""Metrics of every variant over steps: mean over seeds, its 95 % interval, and every seed."""

from collections.abc import Mapping, Sequence

import numpy as np

from moejax.analysis import figures
from moejax.analysis.page import Block, Choice, Figure, Page
from moejax.analysis.pages import by_source
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.analysis.variants import by_name, legend, marked
from moejax.sweep.results import PER_BYTE
from moejax.sweep.statistics import estimate
from moejax.train import scales

METRICS = {
    "held-out loss": ("eval", "loss"),
    "training loss": ("train", "loss"),
    "gradient norm": ("train", "grad_norm"),
    "imbalance": ("train", "moe/max_vio"),
    "drops in training": ("train", "moe/drop_rate"),
    "drops in evaluation": ("eval", "moe/drop_rate"),
}
SETTLED = 25
CLEAR = 6
"""With more variants than this, the means are drawn alone at first."""
DASHES = ("solid", "dash", "dot", "dashdot")


def page(sweep: SweepData) -> Page:
    options: dict[str, list[Block]] = {}
    runs = [run for variant in sweep.variants for run in sweep.runs(variant)]
    for name, (split, key) in {**METRICS, **by_source.metrics(runs)}.items():
        block = _metric(sweep, name, split, key)
        if block:
            options[name] = [block]
    return Page("Curves", [Choice("metric", dict(options))] if options else [])


def curve_scale(name: str, key: str, unit: str, values: Sequence[float]) -> figures.Scale:
    """The scale of one of ``METRICS``, or of the loss of a source; losses are in ``unit``."""
    if key == "loss" or key.startswith(by_source.LOSS):
        return figures.loss(name, unit, values)
    if key == "grad_norm":
        least = scales.least_relative(values)
        return figures.from_0("gradient norm before clipping", "L2", least)
    if key == "moe/max_vio":
        return figures.from_0("imbalance", "max load / mean load - 1", scales.IMBALANCE)
    return figures.share("dropped", "share of pairs")


def converted(runs: Sequence[RunData]) -> str:
    """A note on training losses that are not recorded in the unit of the figure."""
    if all(run.bytes_per_token == 1.0 for run in runs):
        return ""
    return (
        " Training losses are recorded per token; here they are divided by the bytes per token of "
        "each run's held-out rows."
    )


def counted(seeds: Mapping[str, int]) -> str:
    """The number of seeds of each variant: "n = 2" or "n: switch 2, base 1"."""
    if len(set(seeds.values())) == 1:
        return f"n = {next(iter(seeds.values()))}"
    return f"n: {', '.join(f'{name} {n}' for name, n in seeds.items())}"


def _metric(sweep: SweepData, name: str, split: str, key: str) -> Block | None:
    """One figure, or two for many variants: the means alone, and with seeds and intervals."""
    unit = sweep.summary.get("unit", PER_BYTE)
    extras, means = _traces(sweep, split, key)
    lines = [*means, *(trace for trace in extras if "fill" not in trace)]  # bands may be cut
    settled = [line["y"][len(line["y"]) // SETTLED :] for line in lines]
    shown = [value for values in settled for value in values if np.isfinite(value)]
    if not shown:
        return None
    scale = curve_scale(name, key, unit, shown)
    axis = scale.axis(shown)
    runs = [run for variant in sweep.variants for run in sweep.runs(variant)]
    note = converted(runs) if split == "train" and key.startswith("loss") else ""
    seeds = {v: len(finished) for v in sweep.variants if (finished := sweep.runs(v))}
    end = (
        "A click on a name hides its variant, a double click all others. Finished trials only, "
        f"{counted(seeds)}.{note}{legend(sweep.summary)}"
    )

    def drawn(traces: list[figures.Spec], what: str, suffix: str = "") -> Figure:
        spec = figures.chart(traces, "step", scale, yaxis=axis, showlegend=True)
        return Figure(spec, f"{what} {end}", height=480, name=f"curves-{name}{suffix}")

    everything = (
        "Mean over the seeds of each variant (thick), every seed (thin) and the 95 % interval of "
        "the mean (shaded; Student's t, so that two seeds have a very wide one)."
    )
    if not extras or len(means) <= CLEAR:
        return drawn([*extras, *means], everything)
    options = {
        "means": [drawn(means, "Mean over the seeds of each variant.")],
        "seeds and intervals": [drawn([*extras, *means], everything, "-seeds")],
    }
    return Choice("shown", dict(options))


def _traces(
    sweep: SweepData, split: str, key: str
) -> tuple[list[figures.Spec], list[figures.Spec]]:
    """Intervals and seeds of variants with several, and means of all."""
    bands, seeds, means = [], [], []
    outcomes = by_name(sweep.summary)
    for index, variant in enumerate(sweep.variants):
        about = outcomes[variant]
        curves = {run.name: run.series(split, key) for run in sweep.runs(variant)}
        curves = {name: curve for name, curve in curves.items() if len(curve[0])}
        if not curves:
            continue
        steps, mean, half = mean_curve(list(curves.values()))
        means.append(
            figures.line(marked(about), steps, mean, legendgroup=variant, line=_style(index))
        )
        if len(curves) == 1:
            continue
        bands.append(_band(variant, index, steps, mean, half))
        for name, (x, y) in curves.items():
            thin = {"line": _style(index) | {"width": 0.8}, "opacity": 0.55, "mode": "lines"}
            quiet = {"legendgroup": variant, "showlegend": False}
            seeds.append(figures.line(marked(about, name), x, y, **thin, **quiet))
    return [*bands, *seeds], means


def mean_curve(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all curves have, their mean there and the half width of its 95 % interval."""
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
    tables = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in curves]
    estimates = [estimate([table[step] for table in tables]) for step in common]
    half = [np.nan if e.half_width is None else e.half_width for e in estimates]
    return np.asarray(common), np.asarray([e.mean for e in estimates]), np.asarray(half)


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
    with_experts = {v: [run for run in sweep.runs(v) if run.has_experts] for v in sweep.variants}
    return {variant: runs for variant, runs in with_experts.items() if runs}
