"""The comparison of sweeps: the losses of all variants, and differences of their configs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.analysis import figures
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text, Warning
from moejax.analysis.pages.comparison import cut_off, least, symbol
from moejax.analysis.pages.overview import QUARTER, at_end
from moejax.analysis.pages.several_runs import OTHER_DATA
from moejax.analysis.pages.sweep_curves import METRICS, converted, curve_scale, mean_curve
from moejax.analysis.pages.sweep_load import drop_rate, spread
from moejax.analysis.several import Several
from moejax.analysis.sweep import SweepData
from moejax.analysis.variants import MARKS, Outcome, by_name, interval, marked, seed_counts
from moejax.config import flatten
from moejax.sweep import picture
from moejax.sweep.picture import Drawn
from moejax.sweep.statistics import paired
from moejax.train.cost import units

Sweeps = Mapping[str, SweepData]


def page(several: Several) -> Page:
    sweeps = several.sweeps
    if any(not _measured(sweep) for sweep in sweeps.values()):
        none = [name for name, sweep in sweeps.items() if not _measured(sweep)]
        blocks: list[Block] = [Warning(f"No trial of {', '.join(none)} has finished.")]
    else:
        blocks = []
    if any(_measured(sweep) for sweep in sweeps.values()):
        blocks = [_losses(sweeps, several.unit), _table(several), *blocks]
    if not several.same_data:
        blocks.append(Warning(OTHER_DATA))
    for name, sweep in sweeps.items():
        blocks += [Warning(f"{name}: {text}") for text in (sweep.stale, *sweep.problems) if text]
    return Page("Comparison", [*blocks, _made(sweeps), _differences(sweeps)])


def curves(several: Several) -> Page:
    """Mean curves of each variant that two sweeps have."""
    sweeps = several.sweeps
    options: dict[str, list[Block]] = {}
    for variant in _variants(sweeps):
        drawn: dict[str, list[Block]] = {}
        for name, (split, key) in METRICS.items():
            figure = _curve(sweeps, variant, name, split, key, several.unit)
            if figure:
                drawn[name] = [figure]
        if drawn:
            options[variant] = [Choice("metric", drawn)]
    return Page("Curves", [Choice("variant", options)] if options else [])


def _measured(sweep: SweepData) -> list[Outcome]:
    return [v for v in sweep.summary["variants"] if v["mean"] is not None]


def _variants(sweeps: Sweeps) -> list[str]:
    """All variants, in the order of the sweeps."""
    return list(dict.fromkeys(v for sweep in sweeps.values() for v in sweep.variants))


def _losses(sweeps: Sweeps, unit: str) -> Figure:
    """A row per variant and sweep, a colour per sweep."""
    drawn = {
        name: [
            dataclasses.replace(each, label=f"{each.label}, {name}")
            for each in picture.drawn_variants(sweep.summary)
        ]
        for name, sweep in sweeps.items()
    }
    everything = [variant for variants in drawn.values() for variant in variants]
    axis = picture.loss_axis(everything, unit)
    traces: list[figures.Spec] = []
    for index, (name, variants) in enumerate(drawn.items()):
        traces.append(_seeds(name, f"C{index}", variants))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": figures.plain(f"{name}, mean of {seed_counts(variants)}"),
                "x": [variant.loss.mean for variant in variants],
                "y": [figures.plain(variant.label) for variant in variants],
                "hovertemplate": "%{y}, mean: %{x:.4f}<extra></extra>",
                "error_x": {"type": "data", "array": [v.loss.half_width for v in variants]},
                "marker": {
                    "color": f"C{index}", "size": 11, "symbol": list(map(symbol, variants)),
                },
            }
        )  # fmt: skip
    labels = {
        (variant.variant, name): figures.plain(variant.label)
        for name, variants in drawn.items()
        for variant in variants
    }
    pairs = [(variant, name) for variant in _variants(sweeps) for name in sweeps]
    order = [labels[pair] for pair in pairs if pair in labels]
    axes = {
        "xaxis": {"range": [axis.low, axis.high]},
        "yaxis": {
            "type": "category", "categoryorder": "array", "categoryarray": order,
            "autorange": "reversed",
        },
    }  # fmt: skip
    spec = figures.chart(traces, f"held-out loss, {unit}", "variant", **axes, showlegend=True)
    caption = (
        f"Held-out loss at the end, in {unit}. Large: mean over {seed_counts(everything)}, with "
        f"its 95 % interval{cut_off(axis)}; small: seeds. {least(everything, unit)} "
        + (MARKS if any(variant.marked for variant in everything) else "")
    )
    return Figure(spec, caption, height=150 + 26 * len(order), name="losses")


def _seeds(name: str, colour: str, variants: Sequence[Drawn]) -> figures.Spec:
    """The finished seeds of a sweep's variants, as small points in the variants' rows."""
    points = [
        (figures.plain(variant.label), seed.loss, seed.seed)
        for variant in variants
        for seed in variant.seeds
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": figures.plain(f"{name}, seeds"),
        "x": [loss for _, loss, _ in points],
        "y": [row for row, _, _ in points],
        "text": [f"seed {seed}" for _, _, seed in points],
        "hovertemplate": "%{y}, %{text}: %{x:.4f}<extra></extra>",
        "marker": {"color": colour, "size": 5, "opacity": 0.6},
        "showlegend": False,
    }


def _table(several: Several) -> Table:
    """A row per variant and sweep; differences to the first sweep that has the variant."""
    unit, sweeps = several.unit, several.sweeps
    header = (
        "variant", "sweep", "n", f"loss, {unit}", "minus the first's", "dropped, training",
        "busiest expert, training", "cost", "leak",
    )  # fmt: skip
    rows = []
    for variant in _variants(sweeps):
        first: Outcome | None = None
        for name, sweep in sweeps.items():
            v = by_name(sweep.summary).get(variant)
            if v is None or v["mean"] is None:
                continue
            runs = sweep.runs(variant)
            rows.append(
                (
                    marked(v),
                    name,
                    str(len(v["seeds"])),
                    interval(v),
                    _difference(v, first) if several.same_data else "-",
                    spread([100 * drop_rate(run, "train") for run in runs], ".2f", " %"),
                    spread([1 + at_end(run, "moe/max_vio") for run in runs], ".2f", " x"),
                    "-" if v["cost"] is None else f"{units.count(v['cost'])} {_cost(sweep)}",
                    v["leak"] or "-",
                )
            )
            first = first or v
    caption = (
        "Means over n finished seeds with the half width of their 95 % interval. minus the "
        "first's: to the same variant of the first sweep that has it, over the seeds that both "
        f"have; it is not a test and not corrected for multiple comparisons. Training: {QUARTER}. "
        + (MARKS if any("\N{DAGGER}" in r[0] or "\N{DOUBLE DAGGER}" in r[0] for r in rows) else "")
    )
    return Table(header, rows, caption.strip())


def _cost(sweep: SweepData) -> str:
    return sweep.summary["cost"]["name"].replace("_", " ")


def _difference(v: Outcome, first: Outcome | None) -> str:
    if first is None:
        return "-"
    own, other = ({t["seed"]: t["loss"] for t in each["trials"]} for each in (v, first))
    difference = paired(own, other)
    if difference is None:
        return "no seed in common"
    half = f" ± {difference.half_width:.4f}" if difference.half_width is not None else " (one seed)"
    return f"{difference.mean:+.4f}{half}"


def _made(sweeps: Sweeps) -> Table:
    rows: list[tuple[str, ...]] = []
    for name, value in (
        ("experiment", lambda sweep: sweep.experiment),
        ("finished", lambda sweep: f"{sum(t.finished for t in sweep.trials)}/{len(sweep.trials)}"),
        ("baseline", lambda sweep: sweep.summary["baseline"] or "-"),
        ("matched", lambda sweep: sweep.summary["match"] or "-"),
        ("data", lambda sweep: _recorded(sweep, "corpus")),
        ("commit", lambda sweep: _recorded(sweep, "commit")),
    ):
        rows.append((name, *(value(sweep) for sweep in sweeps.values())))
    return Table(("what ran", *sweeps), rows)


def _recorded(sweep: SweepData, key: str) -> str:
    runs = [trial.run for trial in sweep.trials if trial.run]
    return ", ".join(sorted({str(run.saved.get(key) or "unknown") for run in runs}))


def _differences(sweeps: Sweeps) -> Table | Text:
    """Fields whose values over the trials of a sweep differ from another's."""
    values = {name: _values(sweep) for name, sweep in sweeps.items()}
    fields = sorted(set().union(*values.values()))
    rows = []
    for field in fields:
        cells = [", ".join(of.get(field, ["no such field"])) for of in values.values()]
        if len(set(cells)) > 1:
            rows.append((field, *cells))
    if not rows:
        return Text("The trials of the sweeps have the same values in every field of the config.")
    caption = "Fields of the config whose values, over all trials of a sweep, differ."
    return Table(("field", *sweeps), rows, caption)


def _values(sweep: SweepData) -> dict[str, list[str]]:
    values: dict[str, set[str]] = {}
    for trial in sweep.trials:
        for field, value in flatten(trial.trial.config).items():
            values.setdefault(field, set()).add(repr(value))
    return {field: sorted(texts) for field, texts in values.items()}


def _curve(
    sweeps: Sweeps, variant: str, name: str, split: str, key: str, unit: str
) -> Figure | None:
    traces: list[figures.Spec] = []
    shown: list[float] = []
    counts: dict[str, int] = {}
    runs: list[Any] = []
    for index, (label, sweep) in enumerate(sweeps.items()):
        own = sweep.runs(variant) if variant in sweep.variants else []
        finished = [curve for run in own if len((curve := run.series(split, key))[0])]
        if not finished:
            continue
        steps, mean, _ = mean_curve(finished)
        traces.append(figures.line(label, steps, mean, line={"color": f"C{index}"}))
        shown += [x for x in mean[len(mean) // 25 :] if math.isfinite(x)]
        counts[label], runs = len(finished), [*runs, *own]
    if not np.size(shown):
        return None
    scale = curve_scale(name, key, unit, shown)
    spec = figures.chart(traces, "step", scale, yaxis=scale.axis(shown), showlegend=True)
    note = converted(runs) if (split, key) == ("train", "loss") else ""
    seeds = ", ".join(f"{label} n = {n}" for label, n in counts.items())
    caption = f"{name.capitalize()} of {variant}, means over finished seeds: {seeds}.{note}"
    return Figure(spec, caption, height=400, name=f"curves-{variant}-{name}")
