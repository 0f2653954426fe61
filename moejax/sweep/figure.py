"""``sweep.png``: loss against cost and time, and differences to the baseline, with matplotlib."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.record.files import replaced
from moejax.sweep import picture
from moejax.sweep.comparison import Summary, to_json
from moejax.sweep.match import TOLERANCE
from moejax.sweep.picture import LEAKS, MISSED, Drawn
from moejax.sweep.results import Result
from moejax.sweep.table import unit
from moejax.train.workdir.summary import ALERT, QUIET, STYLE

# Okabe and Ito's palette without its yellow, too light for points, and with a grey.
COLOURS = (
    "#595959", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7",
)  # fmt: skip
CIRCLES = "o^vP"
"""Once the colours are used up, they start again with the next shape in place of a circle."""
MARKERS = {"diamond": "D", "square": "s"}
NOTE_WIDTH = 15.5
"""Characters of a note per inch of the picture."""

Styles = Mapping[str, dict[str, Any]]


def write_figure(folder: Path, title: str, results: Sequence[Result], summary: Summary) -> None:
    """Draw ``<folder>/sweep.png``, replacing an older one."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = figure(title, results, summary)
        with replaced(folder / "sweep.png") as temporary:
            drawn.savefig(temporary, format="png")


def figure(title: str, results: Sequence[Result], summary: Summary) -> Any:
    """The picture as a ``matplotlib.figure.Figure``, outside pyplot: no window, no global state.

    Results without a finite loss have no point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    variants = picture.drawn_variants(to_json(summary))
    compared = [variant for variant in variants if variant.difference]
    styles = _styles(variants)
    size, ratios = ((17, 5.6), (1, 1, 0.75)) if compared else ((12, 5.6), (1, 1))
    drawn: Any = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    grid = drawn.add_gridspec(1, len(ratios), width_ratios=ratios)
    left = drawn.add_subplot(grid[0])
    right = drawn.add_subplot(grid[1], sharey=left)
    right.tick_params(labelleft=False)
    left.set_ylabel(f"held-out loss at the end, {summary.unit}")
    losses = picture.loss_axis(variants, summary.unit)
    left.set_ylim(losses.low, losses.high)
    for axes, panel in zip((left, right), _panels(results, summary), strict=True):
        _draw_losses(axes, panel, variants, styles, summary)
    if compared:
        _draw_differences(drawn.add_subplot(grid[2]), compared, styles, summary)
    _draw_legend(drawn, variants, styles)
    notes = _notes(title, variants, summary, bool(losses.cut), width=int(NOTE_WIDTH * size[0]))
    below = 0.02 + 0.035 * len(notes)
    drawn.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    for line, (note, colour) in enumerate(reversed(notes)):
        text = note.replace("$", r"\$")  # matplotlib would read it as mathematics
        place = 0.15 / size[0], 0.022 + 0.035 * line
        drawn.text(*place, text, color=colour, va="center", fontsize=9)
    return drawn


def _styles(variants: Sequence[Drawn]) -> Styles:
    """The style of each variant's points: colour and shape, open if it is marked."""
    styles = {}
    for i, variant in enumerate(variants):
        colour = COLOURS[i % len(COLOURS)]
        styles[variant.variant] = {
            "marker": MARKERS.get(variant.symbol, CIRCLES[i // len(COLOURS) % len(CIRCLES)]),
            "color": colour,
            "markerfacecolor": "white" if variant.marked else colour,
        }
    return styles


@dataclasses.dataclass(frozen=True)
class _Panel:
    """Loss against one cost. If the sweep matches it, a band shows the tolerance."""

    title: str
    label: str
    cost: Mapping[tuple[str, int], float]
    matched: bool


def _panels(results: Sequence[Result], summary: Summary) -> list[_Panel]:
    """Loss against compute or parameters, and against time."""

    def panel(title: str, label: str, cost: Callable[[Result], float], matched: bool) -> _Panel:
        return _Panel(title, label, {(r.variant, r.seed): cost(r) for r in results}, matched)

    by_time, by_size = summary.match == "step_time", summary.match == "total_params"
    if by_size:
        scale, prefix = unit([result.total_parameters for result in results])
        label = f"total parameters ({prefix or 'number'})"
        first = panel("Loss against size", label, lambda r: r.total_parameters / scale, True)
    else:
        scale, prefix = unit([result.train_flops_per_token for result in results])
        label = f"measured active {prefix}FLOP per token, forward and backward"
        matched = summary.match == "active_flops"
        first = panel(
            "Loss against compute", label, lambda r: r.train_flops_per_token / scale, matched
        )
    label = "seconds of training steps, without compilation and evaluation"
    title = "Loss against time"
    if by_time:
        label = "seconds per step, median"
        return [first, panel(title, label, lambda r: r.seconds_per_step, True)]
    return [first, panel(title, label, lambda r: r.train_seconds, False)]


def _draw_losses(
    axes: Any, panel: _Panel, variants: Sequence[Drawn], styles: Styles, summary: Summary
) -> None:
    """Seeds as points, joined to their mean with its 95 % interval; the baseline dashed."""
    variants = picture.with_costs(variants, panel.cost)
    axis = picture.cost_axis(variants)
    axes.set(title=panel.title, xlabel=panel.label)
    if axis.log:
        from matplotlib import ticker

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(axis.low, axis.high)
    for variant in variants:
        if variant.variant == summary.baseline:
            quiet = {"color": QUIET, "zorder": 1}
            axes.axhline(variant.loss.mean, linestyle="--", linewidth=1, **quiet)
            if panel.matched and variant.cost is not None:
                ends = variant.cost * (1 - TOLERANCE), variant.cost * (1 + TOLERANCE)
                axes.axvspan(*ends, alpha=0.15, linewidth=0, **quiet)
        style = styles[variant.variant]
        points = [(seed.cost, seed.loss) for seed in variant.seeds if seed.cost is not None]
        if variant.cost is None or not points:
            continue
        line = {"color": style["color"], "alpha": 0.6, "zorder": 2}
        for cost, loss in points:
            axes.plot((variant.cost, cost), (variant.loss.mean, loss), linewidth=1, **line)
        if variant.loss.half_width:
            bar = {"yerr": variant.loss.half_width, "capsize": 4, "linewidth": 1.2, **line}
            axes.errorbar(variant.cost, variant.loss.mean, **bar)
        axes.scatter(*zip(*points, strict=True), s=64, zorder=3, **_scatter(style))


def _scatter(style: dict[str, Any]) -> dict[str, Any]:
    """A line marker's style as one of ``scatter``."""
    return {
        "marker": style["marker"],
        "facecolors": style["markerfacecolor"],
        "edgecolors": style["color"],
    }


def _draw_differences(
    axes: Any, compared: Sequence[Drawn], styles: Styles, summary: Summary
) -> None:
    """A row per variant: its seeds, their mean with the 95 % interval, and the outcome."""
    axes.axvline(0, color=QUIET, linestyle="--", linewidth=1, zorder=1)
    for row, variant in enumerate(compared):
        style, difference = styles[variant.variant], variant.difference
        assert difference is not None
        seeds = [seed.difference for seed in variant.seeds if seed.difference is not None]
        axes.scatter(seeds, [row] * len(seeds), color=style["color"], s=12, alpha=0.6, zorder=2)
        if difference.half_width:
            bar = {"color": style["color"], "linewidth": 1.6, "capsize": 4, "zorder": 2}
            axes.errorbar(difference.mean, row, xerr=difference.half_width, **bar)
        axes.scatter([difference.mean], [row], s=52, zorder=3, **_scatter(style))
        side = axes.get_yaxis_transform()
        axes.text(1.02, row, variant.outcome, transform=side, va="center", color=QUIET, size=9)
    axes.set_yticks(range(len(compared)), [variant.label for variant in compared])
    for label, variant in zip(axes.get_yticklabels(), compared, strict=True):
        label.set(color=styles[variant.variant]["color"], fontweight="bold")
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axis = picture.difference_axis(compared, summary.unit)
    axes.set_xlim(axis.low, axis.high)
    axes.set(
        title=f"Difference to {summary.baseline} at equal seeds",
        xlabel=f"loss minus {summary.baseline}'s, {summary.unit}; left is better",
    )


def _draw_legend(drawn: Any, variants: Sequence[Drawn], styles: Styles) -> None:
    """The names of all variants above the panels."""
    from matplotlib.lines import Line2D

    if not variants:
        return
    handles = [
        Line2D([], [], linestyle="", markersize=8, label=variant.label, **styles[variant.variant])
        for variant in variants
    ]
    columns = min(len(variants), 8)
    colours = [styles[variant.variant]["color"] for variant in variants]
    drawn.legend(handles=handles, loc="outside upper center", ncols=columns, labelcolor=colours)


def _notes(
    title: str, variants: Sequence[Drawn], summary: Summary, cut: bool, width: int
) -> list[tuple[str, str]]:
    """The lines below the panels with their colours."""
    bars = "a bar is the 95 % interval of a variant's mean" + (", cut at the edge" if cut else "")
    line = f"; the dashed line is the mean of {summary.baseline}" if summary.baseline else ""
    least = picture.least_span(variants, summary.unit)
    axis = f"; the loss axis spans at least {least:.2g} {summary.unit}"
    notes = [(f"every seed is a point ({_seeds(summary)}), {bars}{line}{axis}: {title}", QUIET)]
    for leak in dict.fromkeys(v.leak for v in summary.variants if v.leak):
        names = ", ".join(v.variant for v in summary.variants if v.leak == leak)
        notes.append((f"{LEAKS} open, {names}: a token's output may depend on {leak}", ALERT))
    missed = [f"{v.variant} ({v.cost_ratio:.3f})" for v in summary.variants if v.missed_match]
    if missed:
        text = (
            f"{MISSED} open, {', '.join(missed)}: {summary.match} differs from "
            f"{summary.baseline}'s by more than {100 * TOLERANCE:g} %"
        )
        notes.append((text, ALERT))
    lost = [f"{v.variant} (seed {seed})" for v in summary.variants for seed in v.diverged]
    if lost:
        notes.append((f"diverged and not shown: {', '.join(lost)}", ALERT))
    return [(row, colour) for text, colour in notes for row in textwrap.wrap(text, width)]


def _seeds(summary: Summary) -> str:
    """The number of finished seeds of each variant."""
    counts = {v.variant: len(v.seeds) for v in summary.variants}
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))} per variant"
    return f"n: {', '.join(f'{name} {n}' for name, n in counts.items())}"
