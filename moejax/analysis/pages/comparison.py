"""Variants side by side: loss against cost with intervals, and differences to the baseline."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from moejax.analysis import figures
from moejax.analysis.outcomes import MARKS, Outcome, interval, marked, of_seeds
from moejax.analysis.page import Block, Figure, Page, Table, Text, Warning
from moejax.analysis.sweep import SweepData
from moejax.sweep.results import PER_BYTE
from moejax.train import scales
from moejax.train.cost import units

LOG_FROM = 3.0
"""An axis whose largest value is this many times its smallest is logarithmic."""
COSTS = 0.1
"""The least span of the costs of variants, relative to the largest."""


def page(sweep: SweepData) -> Page:
    summary = sweep.summary
    variants = summary["variants"]
    measured = [v for v in variants if v["mean"] is not None]
    if not measured:
        return Page("Comparison", [Text("No trial has finished: there is nothing to compare yet.")])
    cost, unit = summary["cost"], summary.get("unit", PER_BYTE)
    blocks: list[Block] = [Warning(sweep.stale)] if sweep.stale else []
    blocks.append(_table(variants, cost, unit))
    if any(v["cost"] is not None for v in measured):
        blocks.append(_scatter(measured, cost, unit))
    if any(v.get("difference") for v in measured):
        blocks.append(_forest(measured, summary))
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
        f"t). difference: to the baseline at equal seeds. {cost['name']}: {cost['unit']}, in "
        f"brackets over the baseline's. {MARKS}"
    )
    said = [c for c in range(len(header)) if any(row[c] != "-" for row in rows)]
    return Table([header[c] for c in said], [[row[c] for c in said] for row in rows], caption)


def losses(measured: Sequence[Outcome], unit: str, name: str) -> Figure:
    """A row per variant: its mean with the interval, and its seeds as small points."""
    traces: list[figures.Spec] = []
    shown = loss_range(measured, unit)
    for index, v in enumerate(measured):
        row, colour = figures.plain(marked(v)), f"C{index % 8}"
        points = [t for t in v["trials"] if t["loss"] is not None]
        traces += [
            {
                "type": "scatter",
                "mode": "markers",
                "name": row,
                "x": [t["loss"] for t in points],
                "y": [row] * len(points),
                "text": [f"seed {t['seed']}" for t in points],
                "hovertemplate": "%{y}, %{text}: %{x:.4f}<extra></extra>",
                "marker": {"color": colour, "size": 5, "opacity": 0.6},
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": row,
                "x": [v["mean"]],
                "y": [row],
                "hovertemplate": "%{y}, mean: %{x:.4f}<extra></extra>",
                "error_x": {"type": "data", "array": [v.get("half_width")], "thickness": 1.2},
                "marker": {"color": colour, "size": 11, "symbol": symbol(v)},
            },
        ]
    beyond = [marked(v) for v in measured if is_beyond(v, shown)]
    caption = (
        f"Held-out loss at the end, in {unit}. Large: mean over {of_seeds(measured)}, with the "
        "95 % interval of the mean"
        + (f" (beyond the axis: {', '.join(beyond)})" if beyond else "")
        + f"; small: seeds. The axis spans at least {least_span(measured, unit):.2g} {unit}."
    )
    axes = {"xaxis": {"range": shown}, "yaxis": {"type": "category", "autorange": "reversed"}}
    spec = figures.chart(traces, f"held-out loss, {unit}", "variant", **axes, showlegend=False)
    return Figure(spec, caption, height=130 + 30 * len(measured), name=name)


def _scatter(measured: list[Outcome], cost: dict[str, str], unit: str) -> Figure:
    """Every variant's mean with its interval, and every seed."""
    costs = [t["cost"] for v in measured for t in v["trials"] if t["cost"]]
    log = max(costs) >= LOG_FROM * min(costs)
    ends = [math.log10(c) if log else c for c in (min(costs), max(costs))]
    least = 0.0 if log else COSTS * max(costs)
    room = max(0.12 * (ends[1] - ends[0]), (least - ends[1] + ends[0]) / 2)  # for names
    shown = loss_range(measured, unit)
    spec = figures.chart(
        _points(measured),
        f"{cost['name'].replace('_', ' ')}, {cost['unit']}",
        f"held-out loss, {unit}",
        xaxis={"type": "log" if log else "linear", "range": [ends[0] - room, ends[1] + room]},
        yaxis={"range": shown},
    )
    beyond = [marked(v) for v in measured if is_beyond(v, shown)]
    caption = (
        f"Large: mean over {of_seeds(measured)}, with the 95 % interval of the mean"
        + (f" (beyond the axis: {', '.join(beyond)})" if beyond else "")
        + f"; small: seeds. The losses' axis spans at least {least_span(measured, unit):.2g} "
        f"{unit}. Open symbols are marked. {MARKS}"
    )
    return Figure(spec, caption, height=500, name="loss-against-cost")


def _points(measured: list[Outcome]) -> list[figures.Spec]:
    """Of each variant its seeds, and its mean with the interval."""
    traces: list[figures.Spec] = []
    # Neighbours in loss have their names on different sides.
    order = sorted(measured, key=lambda v: v["mean"])
    sides = {v["variant"]: rank % 2 for rank, v in enumerate(order)}
    for index, v in enumerate(measured):
        colour, shape = f"C{index % 8}", symbol(v)
        trials = [t for t in v["trials"] if t["loss"] is not None and t["cost"] is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": figures.plain(marked(v)),
                "legendgroup": v["variant"],
                "showlegend": False,
                "x": [t["cost"] for t in trials],
                "y": [t["loss"] for t in trials],
                "text": [f"seed {t['seed']}" for t in trials],
                "hovertemplate": "%{fullData.name}, %{text}: %{y:.4f}<extra></extra>",
                "marker": {"color": colour, "size": 5, "opacity": 0.6, "symbol": shape},
            }
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": figures.plain(marked(v)),
                "legendgroup": v["variant"],
                "x": [v["cost"]],
                "y": [v["mean"]],
                "text": [figures.plain(marked(v))],
                "textposition": "middle right" if sides[v["variant"]] else "middle left",
                "textfont": {"color": colour},
                "hovertemplate": "%{text}: %{y:.4f} at %{x:.4g}<extra></extra>",
                "error_y": {"type": "data", "array": [v.get("half_width")], "thickness": 1.2},
                "marker": {"color": colour, "size": 11, "symbol": shape},
            }
        )
    return traces


def symbol(v: Outcome) -> str:
    """What a variant is drawn as: open if it is marked."""
    if v["leak"]:
        return "diamond-open"
    return "square-open" if v["missed_match"] else "circle"


def least_span(measured: Sequence[Outcome], unit: str) -> float:
    """What the axis of these variants' losses spans at least."""
    return scales.least_loss(unit, (v["mean"] for v in measured))


def loss_range(measured: Sequence[Outcome], unit: str) -> list[float]:
    """Of the seeds, and of intervals that are not far wider; never less than ``least_span``."""
    losses = [t["loss"] for v in measured for t in v["trials"] if t["loss"] is not None]
    losses = [loss for loss in losses if math.isfinite(loss)]
    least = least_span(measured, unit)
    reach = max(max(losses) - min(losses), least)
    return list(scales.span([*losses, *_ends(measured, reach)], least))


def _ends(values: Iterable[dict[str, Any]], reach: float) -> list[float]:
    """The ends of intervals that reach no further than ``reach``."""
    halves = [(v["mean"], v.get("half_width")) for v in values]
    return [m + s * h for m, h in halves if h is not None and h <= reach for s in (-1, 1)]


def is_beyond(v: dict[str, Any], axis: Sequence[float]) -> bool:
    """Whether its interval is cut off."""
    half = v.get("half_width") or 0.0
    return v["mean"] - half < axis[0] or v["mean"] + half > axis[1]


def _forest(measured: list[Outcome], summary: dict[str, Any]) -> Figure:
    """Differences to the baseline with their intervals, one under the other."""
    traces: list[figures.Spec] = []
    for index, v in enumerate(measured):
        difference = v.get("difference")
        if not difference:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": figures.plain(marked(v)),
                "x": [difference["mean"]],
                "y": [figures.plain(marked(v))],
                "error_x": {"type": "data", "array": [difference.get("half_width")]},
                "marker": {"size": 10, "color": f"C{index % 8}", "symbol": symbol(v)},
                "hovertemplate": "%{y}: %{x:+.4f}<extra></extra>",
            }
        )
    baseline, unit = summary.get("baseline", "?"), summary.get("unit", PER_BYTE)
    shown, beyond = _difference_range(measured, unit)
    axes = {
        "yaxis": {"type": "category", "autorange": "reversed"},
        "xaxis": {"zeroline": True, "zerolinewidth": 2, "range": shown},
    }
    title = f"loss minus that of {figures.plain(baseline)}, {unit}"
    spec = figures.chart(traces, title, "variant", **axes, showlegend=False)
    caption = (
        f"Mean difference over {of_seeds(measured)} at equal seeds, and its 95 % interval"
        + (f" (beyond the axis: {', '.join(beyond)})" if beyond else "")
        + f": left of 0 is better than the baseline {baseline}. The axis spans at least "
        f"{least_span(measured, unit):.2g} {unit}. {MARKS}"
    )
    return Figure(spec, caption, height=120 + 30 * len(traces), name="differences")


def _difference_range(measured: Sequence[Outcome], unit: str) -> tuple[list[float], list[str]]:
    """The axis of differences, with 0 on it, and the variants whose intervals leave it."""
    found = {marked(v): v["difference"] for v in measured if v.get("difference")}
    least, means = least_span(measured, unit), [0.0, *(d["mean"] for d in found.values())]
    reach = max(max(means) - min(means), least)
    shown = list(scales.span([*means, *_ends(found.values(), 2 * reach)], least))
    return shown, [name for name, difference in found.items() if is_beyond(difference, shown)]
