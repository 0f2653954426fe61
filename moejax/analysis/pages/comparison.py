"""The variants of a sweep: loss against cost with intervals, and differences to the baseline."""

import math
from collections.abc import Sequence
from typing import Any

from moejax.analysis import figures
from moejax.analysis.page import Block, Figure, Page, Table, Text, Warning
from moejax.analysis.sweep import SweepData
from moejax.analysis.variants import MARKS, Outcome, interval, marked, seed_counts
from moejax.sweep import picture
from moejax.sweep.picture import Drawn
from moejax.sweep.results import PER_BYTE
from moejax.train.cost import units


def page(sweep: SweepData) -> Page:
    summary = sweep.summary
    variants = picture.drawn_variants(summary)
    if not variants:
        return Page("Comparison", [Text("No trial has finished: there is nothing to compare yet.")])
    cost, unit = summary["cost"], summary.get("unit", PER_BYTE)
    blocks: list[Block] = [Warning(sweep.stale)] if sweep.stale else []
    blocks.append(_table(summary["variants"], cost, unit))
    if any(variant.cost is not None for variant in variants):
        blocks.append(_scatter(variants, cost, unit))
    if any(variant.difference for variant in variants):
        blocks.append(_differences(variants, str(summary["baseline"]), unit))
    return Page("Comparison", blocks)


def _table(variants: list[Outcome], cost: dict[str, str], unit: str) -> Table:
    header = (
        "variant", "seeds", f"loss, {unit}", "difference", "p (Holm)", cost["name"], "verdict",
        "leak",
    )  # fmt: skip
    rows = []
    for v in variants:
        difference = v.get("difference") or {}
        p = difference.get("p_holm")
        ratio = f" ({v['cost_ratio']:.2f} x)" if v.get("cost_ratio") is not None else ""
        rows.append(
            (
                marked(v),
                f"{len(v['seeds'])}/{v['wanted']}" + (" diverged" if v.get("diverged") else ""),
                interval(v) if v["mean"] is not None else "-",
                interval(difference) if difference else "-",
                "-" if p is None else f"{p:.2g}",
                "-" if v["cost"] is None else units.count(v["cost"]) + ratio,
                v.get("verdict") or "-",
                v["leak"] or "-",
            )
        )
    caption = (
        "Held-out loss at the end: mean over seeds and half width of its 95 % interval (Student's "
        f"t). difference: to the baseline at equal seeds. {cost['name']}: {cost['unit']}, with the "
        f"ratio to the baseline's in brackets. {MARKS}"
    )
    filled = [c for c in range(len(header)) if any(row[c] != "-" for row in rows)]
    return Table([header[c] for c in filled], [[row[c] for c in filled] for row in rows], caption)


def losses(variants: Sequence[Drawn], unit: str, name: str) -> Figure:
    """A row per variant: its mean with the interval, and its seeds as small points."""
    axis = picture.loss_axis(variants, unit)
    traces: list[figures.Spec] = []
    for index, variant in enumerate(variants):
        row = figures.plain(variant.label)
        points = [(seed.loss, row, seed.seed) for seed in variant.seeds]
        mean = (variant.loss.mean, row)
        traces += [
            _seeds(variant, index, points, "%{y}, %{text}: %{x:.4f}"),
            _mean(variant, index, mean, {"error_x": variant.loss}, "%{y}, mean: %{x:.4f}"),
        ]
    axes = {"xaxis": {"range": _range(axis)}, "yaxis": ROWS}
    spec = figures.chart(traces, f"held-out loss, {unit}", "variant", **axes, showlegend=False)
    caption = (
        f"Held-out loss at the end, in {unit}. Large: mean over {seed_counts(variants)}, with the "
        f"95 % interval of the mean{cut_off(axis)}; small: seeds. {least(variants, unit)}"
    )
    return Figure(spec, caption, height=130 + 30 * len(variants), name=name)


ROWS = {"type": "category", "autorange": "reversed"}
"""An axis with a row per variant, the first on top."""


def _scatter(variants: Sequence[Drawn], cost: dict[str, str], unit: str) -> Figure:
    """Every variant's mean with its interval, and every seed, against the cost."""
    # Neighbours in loss have their names on different sides.
    order = sorted(variants, key=lambda variant: variant.loss.mean)
    sides = {variant.label: rank % 2 for rank, variant in enumerate(order)}
    traces: list[figures.Spec] = []
    for index, variant in enumerate(variants):
        points = [(s.cost, s.loss, s.seed) for s in variant.seeds if s.cost is not None]
        mean = (variant.cost, variant.loss.mean)
        label = {
            "mode": "markers+text",
            "text": [figures.plain(variant.label)],
            "textposition": "middle right" if sides[variant.label] else "middle left",
            "textfont": {"color": f"C{index % 8}"},
        }
        seeds = _seeds(variant, index, points, "%{fullData.name}, %{text}: %{y:.4f}")
        hover = "%{text}: %{y:.4f} at %{x:.4g}"
        traces += [
            {**seeds, "legendgroup": variant.variant, "showlegend": False},
            {
                **_mean(variant, index, mean, {"error_y": variant.loss}, hover),
                "legendgroup": variant.variant,
                **label,
            },
        ]
    losses, costs = picture.loss_axis(variants, unit), picture.cost_axis(variants)
    spec = figures.chart(
        traces,
        f"{cost['name'].replace('_', ' ')}, {cost['unit']}",
        f"held-out loss, {unit}",
        xaxis={"type": "log" if costs.log else "linear", "range": _range(costs)},
        yaxis={"range": _range(losses)},
    )
    caption = (
        f"Large: mean over {seed_counts(variants)}, with the 95 % interval of the mean"
        f"{cut_off(losses)}; small: seeds. {least(variants, unit, 'loss axis')} Open symbols are "
        f"marked. {MARKS}"
    )
    return Figure(spec, caption, height=500, name="loss-against-cost")


def _differences(variants: Sequence[Drawn], baseline: str, unit: str) -> Figure:
    """Differences to the baseline with their intervals, one below the other."""
    axis = picture.difference_axis(variants, unit)
    traces: list[figures.Spec] = []
    for index, variant in enumerate(variants):
        if variant.difference is None:
            continue
        row = figures.plain(variant.label)
        points = [(s.difference, row, s.seed) for s in variant.seeds if s.difference is not None]
        if points:
            traces.append(_seeds(variant, index, points, "%{y}, %{text}: %{x:+.4f}"))
        mean = (variant.difference.mean, row)
        bar = {"error_x": variant.difference}
        traces.append(_mean(variant, index, mean, bar, "%{y}: %{x:+.4f}"))
    axes = {
        "yaxis": ROWS,
        "xaxis": {"zeroline": True, "zerolinewidth": 2, "range": _range(axis)},
    }
    title = f"loss minus that of {figures.plain(baseline)}, {unit}"
    spec = figures.chart(traces, title, "variant", **axes, showlegend=False)
    caption = (
        f"Mean difference over {seed_counts(variants)} at equal seeds, with its 95 % interval"
        f"{cut_off(axis)}: left of 0 is better than the baseline {baseline}. "
        f"{least(variants, unit)} {MARKS}"
    )
    rows = sum(variant.difference is not None for variant in variants)
    return Figure(spec, caption, height=120 + 30 * rows, name="differences")


def _seeds(
    variant: Drawn, index: int, points: Sequence[tuple[Any, Any, int]], hover: str
) -> figures.Spec:
    """The seeds of a variant as small points, given as x, y and the number of the seed."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": figures.plain(variant.label),
        "x": [x for x, _, _ in points],
        "y": [y for _, y, _ in points],
        "text": [f"seed {seed}" for _, _, seed in points],
        "hovertemplate": f"{hover}<extra></extra>",
        "marker": {"color": f"C{index % 8}", "size": 5, "opacity": 0.6, "symbol": symbol(variant)},
    }


def _mean(
    variant: Drawn,
    index: int,
    point: tuple[Any, Any],
    bar: dict[str, picture.Interval],
    hover: str,
) -> figures.Spec:
    """The mean of a variant as a large point with the interval of ``bar``."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": figures.plain(variant.label),
        "x": [point[0]],
        "y": [point[1]],
        "hovertemplate": f"{hover}<extra></extra>",
        "marker": {"color": f"C{index % 8}", "size": 11, "symbol": symbol(variant)},
        **{
            side: {"type": "data", "array": [interval.half_width], "thickness": 1.2}
            for side, interval in bar.items()
        },
    }


def symbol(variant: Drawn) -> str:
    """Plotly's name for the symbol of a variant, open if it is marked."""
    return f"{variant.symbol}-open" if variant.marked else variant.symbol


def cut_off(axis: picture.Axis) -> str:
    """The part of a caption that names the variants whose intervals the axis cuts off."""
    return f" (beyond the axis: {', '.join(axis.cut)})" if axis.cut else ""


def least(variants: Sequence[Drawn], unit: str, axis: str = "axis") -> str:
    """The sentence of a caption about the least span of an axis of losses."""
    return f"The {axis} spans at least {picture.least_span(variants, unit):.2g} {unit}."


def _range(axis: picture.Axis) -> list[float]:
    """The range of a plotly axis, which takes exponents of 10 for a logarithmic one."""
    ends = (axis.low, axis.high)
    return [math.log10(end) for end in ends] if axis.log else list(ends)
