"""Results as a picture: loss against what a token costs and against the time it took."""

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.record.files import replaced
from moejax.sweep import forest
from moejax.sweep.comparison import Compared, Summary
from moejax.sweep.labels import Box, Pixel, around, place
from moejax.sweep.match import TOLERANCE
from moejax.sweep.results import Result
from moejax.sweep.table import unit
from moejax.train import scales
from moejax.train.workdir.summary import ALERT, QUIET, STYLE

# Okabe and Ito's palette without its yellow, too light for points, and with a grey.
COLOURS = (
    "#595959", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7",
)  # fmt: skip
SHAPES = "osD^vP"
"""A variant beyond the colours takes the next shape."""
LOG_FROM = 3.0
"""An axis whose largest value is this many times its smallest is logarithmic."""
LEAKS, MISSES = "\N{DAGGER}", "\N{NOT EQUAL TO}"
BEYOND = 1.0
"""Intervals show up to this many heights of all points above and below them."""
COSTS = 0.1
"""The least span of costs and times, relative to the largest."""
NOTE_WIDTH = 15.5
"""Letters of a note per inch of the picture."""


def write_figure(folder: Path, title: str, results: Sequence[Result], summary: Summary) -> None:
    """Draws ``<folder>/sweep.png`` in place of an older one."""
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

    results = [result for result in results if math.isfinite(result.loss)]
    wide = bool(forest.rows(summary))
    size, ratios = ((17, 5.2), (1, 1, 0.75)) if wide else ((12, 5.2), (1, 1))
    drawn: Any = Figure(figsize=size, dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(drawn)
    grid = drawn.add_gridspec(1, len(ratios), width_ratios=ratios)
    left = drawn.add_subplot(grid[0])
    right = drawn.add_subplot(grid[1], sharey=left)
    right.tick_params(labelleft=False)
    panels = _panels((left, right), results, summary)
    left.set_ylabel(f"held-out loss at the end, {summary.unit}")
    cut = _limit_losses(left, results, summary)
    for panel in panels:
        panel.scatter(results)
    if wide:
        names = {variant.variant: _name(variant) for variant in summary.variants}
        forest.draw(drawn.add_subplot(grid[2]), summary, _styles(results), names)
    notes = _notes(title, results, summary, cut, width=int(NOTE_WIDTH * size[0]))
    below = 0.02 + 0.035 * len(notes)
    drawn.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    for line, (note, colour) in enumerate(reversed(notes)):
        text = note.replace("$", r"\$")  # matplotlib would read it as mathematics
        place = 0.15 / size[0], 0.022 + 0.035 * line
        drawn.text(*place, text, color=colour, va="center", fontsize=9)
    canvas.draw()  # places the axes; labels are laid out in their pixels
    drawn.set_layout_engine("none")
    for panel in panels:
        panel.label(results)
    return drawn


def _name(variant: Compared) -> str:
    """The variant with its marks."""
    marks = LEAKS * bool(variant.leak) + MISSES * variant.missed_match
    return f"{variant.variant} {marks}".strip()


def _panels(axes: Sequence[Any], results: Sequence[Result], summary: Summary) -> list["_Panel"]:
    """Loss against compute or parameters, and against time. A cost that is matched has its band."""
    left, right = axes
    if summary.match == "total_params":
        scale, prefix = unit([result.total_parameters for result in results])
        title, label = "Loss against size", f"total parameters ({prefix or 'number'})"
        cost: Callable[[Result], float] = lambda r: r.total_parameters / scale
    else:
        scale, prefix = unit([result.train_flops_per_token for result in results])
        title = "Loss against compute"
        label = f"measured active {prefix}FLOP per token, forward and backward"
        cost = lambda r: r.train_flops_per_token / scale
    left.set(title=title, xlabel=label)
    if summary.match == "step_time":
        right.set(title="Loss against time", xlabel="seconds per step, median")
        time: Callable[[Result], float] = lambda r: r.seconds_per_step
    else:
        label = "seconds of training steps, without compilation and evaluation"
        right.set(title="Loss against time", xlabel=label)
        time = lambda r: r.train_seconds
    by_time = summary.match == "step_time"
    matched = summary.match is not None
    return [
        _Panel(left, cost, summary, matched and not by_time),
        _Panel(right, time, summary, by_time),
    ]


def _limit_losses(axes: Any, results: Sequence[Result], summary: Summary) -> bool:
    """Sets the losses' axis; whether an interval leaves it (of two seeds it is nine deviations)."""
    losses = [result.loss for result in results]
    if not losses:
        return False
    low, high = min(losses), max(losses)
    least = scales.least_loss(summary.unit, losses)
    reach = BEYOND * max(high - low, least)
    intervals = [(v.mean, v.half_width) for v in summary.variants]
    ends = [mean + side * half for mean, half in intervals if mean and half for side in (-1, 1)]
    inside = [min(max(end, low - reach), high + reach) for end in ends]
    axes.set_ylim(scales.span([low, high, *inside], least))
    return inside != ends


def _notes(
    title: str, results: Sequence[Result], summary: Summary, cut: bool, width: int
) -> list[tuple[str, str]]:
    """Lines below the panels, and their colours."""
    bars = "a bar is the 95 % interval of a variant's mean" + (", cut at the edge" if cut else "")
    line = f"; the dashed line is the mean of {summary.baseline}" if summary.baseline else ""
    least = scales.least_loss(summary.unit, [result.loss for result in results])
    axis = f"; the losses' axis spans at least {least:.2g} {summary.unit}"
    said = [(f"every seed is a point ({_seeds(summary)}), {bars}{line}{axis}: {title}", QUIET)]
    for leak in dict.fromkeys(result.leak for result in results if result.leak):
        names = ", ".join(v.variant for v in summary.variants if v.leak == leak)
        said.append((f"{LEAKS} {names}: a token's output may depend on {leak}", ALERT))
    missed = [f"{v.variant} ({v.cost_ratio:.3f})" for v in summary.variants if v.missed_match]
    if missed:
        text = (
            f"{MISSES} hollow, {', '.join(missed)}: {summary.match} misses {summary.baseline}'s by "
            f"more than {100 * TOLERANCE:g} %"
        )
        said.append((text, ALERT))
    lost = [f"{v.variant} (seed {s})" for v in summary.variants for s in v.diverged]
    if lost:
        said.append((f"diverged and not shown: {', '.join(lost)}", ALERT))
    return [(row, colour) for text, colour in said for row in textwrap.wrap(text, width)]


def _seeds(summary: Summary) -> str:
    """How many finished seeds the variants have."""
    counts = {v.variant: len(v.seeds) for v in summary.variants}
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))} per variant"
    return f"n: {', '.join(f'{name} {n}' for name, n in counts.items())}"


@dataclasses.dataclass
class _Panel:
    """One pair of axes: loss against ``value``; with a band where a cost keeps the match."""

    axes: Any
    value: Callable[[Result], float]
    summary: Summary
    matched: bool

    def scatter(self, results: Sequence[Result]) -> None:
        from matplotlib import ticker

        values = [self.value(r) for r in results if math.isfinite(self.value(r))]
        if values and max(values) >= LOG_FROM * min(values) > 0:
            self.axes.set_xscale("log")
            self.axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            self.axes.xaxis.set_minor_locator(ticker.NullLocator())
            self.axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        self.axes.margins(x=0.2, y=0.12)  # room for labels
        if values and self.axes.get_xscale() == "linear":
            first, last = min(values), max(values)
            room = max(0.2 * (last - first), (COSTS * abs(last) - last + first) / 2)
            self.axes.set_xlim(first - room, last + room or 1.0)
        self._draw_baseline(results)
        for variant, style in _styles(results).items():
            self._draw([r for r in results if r.variant == variant], variant, *style)

    def _draw_baseline(self, results: Sequence[Result]) -> None:
        own = [r for r in results if r.variant == self.summary.baseline]
        if not own:
            return
        style = {"color": QUIET, "zorder": 1}
        level = statistics.fmean(r.loss for r in own)
        self.axes.axhline(level, linestyle="--", linewidth=1, **style)
        cost = statistics.fmean(map(self.value, own))
        if self.matched and math.isfinite(cost):
            ends = cost * (1 - TOLERANCE), cost * (1 + TOLERANCE)
            self.axes.axvspan(*ends, alpha=0.15, linewidth=0, **style)

    def _draw(self, own: Sequence[Result], variant: str, colour: str, shape: str) -> None:
        compared = self.summary.of(variant)
        own = [r for r in own if math.isfinite(self.value(r))]
        if not own:
            return
        x, y = [self.value(r) for r in own], [r.loss for r in own]
        # Spokes to the mean, beside which the name stands.
        mean = statistics.fmean(x), statistics.fmean(y)
        for point in zip(x, y, strict=True):
            ends = zip(mean, point, strict=True)
            self.axes.plot(*ends, color=colour, linewidth=1, alpha=0.6, zorder=2)
        if compared.half_width:
            bar = {"color": colour, "linewidth": 1.2, "capsize": 4, "alpha": 0.8, "zorder": 2}
            self.axes.errorbar(*mean, yerr=compared.half_width, **bar)
        missed = {point.seed for point in compared.trials if point.missed_match}
        self.axes.scatter(
            x,
            y,
            facecolors=["white" if r.seed in missed else colour for r in own],
            marker=shape,
            s=64,
            edgecolors=[ALERT if r.leak else colour if r.seed in missed else "white" for r in own],
            linewidths=[1.4 if r.leak or r.seed in missed else 0.8 for r in own],
            zorder=3,
        )

    def label(self, results: Sequence[Result]) -> None:
        """A name beside each variant's mean or a point of it, hiding no point and no other name."""
        from matplotlib.lines import Line2D

        figure = self.axes.figure
        renderer = figure.canvas.get_renderer()
        inside = Box(*self.axes.get_window_extent(renderer).extents)
        anchors, taken = self._anchors_and_marks(results)
        for variant, (colour, _) in _styles(results).items():
            if variant not in anchors:
                continue
            name = _name(self.summary.of(variant))
            style = {"color": colour, "fontweight": "bold", "va": "bottom", "zorder": 4}
            text = figure.text(0, 0, name, transform=None, **style)
            extent = text.get_window_extent(renderer)
            box, (x, y) = place(anchors[variant], extent.width, extent.height, taken, inside)
            taken.append(box)
            # Relative to the figure, so that it may be saved with another resolution.
            to_figure = figure.transFigure.inverted().transform
            text.set(position=to_figure((box.left, box.low)), transform=figure.transFigure)
            if box.distance(x, y) > 16:
                nearest = min(max(x, box.left), box.right), min(max(y, box.low), box.high)
                ends = zip(to_figure((x, y)), to_figure(nearest), strict=True)
                line = Line2D(*ends, transform=figure.transFigure, color=colour, linewidth=0.8)
                figure.add_artist(line)

    def _anchors_and_marks(
        self, results: Sequence[Result]
    ) -> tuple[dict[str, list[Pixel]], list[Box]]:
        """Where a name may stand: mean and points; what it may not cover: these, spokes, bars."""
        to_pixels = self.axes.transData.transform
        anchors, marks = {}, []
        for variant in _styles(results):
            own = [(self.value(r), r.loss) for r in results if r.variant == variant]
            own = [point for point in own if math.isfinite(point[0])]
            if not own:
                continue
            x, y = mean = to_pixels([statistics.fmean(a) for a in zip(*own, strict=True)])
            points = [to_pixels(point) for point in own]
            anchors[variant] = [mean, *points]
            for px, py in points:
                marks.append(around(px, py, 6))
                spoke = ((px + (x - px) * i / 8, py + (y - py) * i / 8) for i in range(8))
                marks += [around(*spot, 2) for spot in spoke]
            half_width = self.summary.of(variant).half_width
            if half_width:
                at, level = (statistics.fmean(a) for a in zip(*own, strict=True))
                heights = (level + half_width * i / 24 for i in range(-24, 25))
                for x, y in (to_pixels((at, height)) for height in heights):
                    marks.append(around(x, y, 3))
        return anchors, marks


def _styles(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Colour and shape of each variant, in the order of the sweep."""
    names = dict.fromkeys(result.variant for result in results)
    return {
        name: (COLOURS[i % len(COLOURS)], SHAPES[i // len(COLOURS) % len(SHAPES)])
        for i, name in enumerate(names)
    }
