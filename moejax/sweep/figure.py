"""Results as a picture: loss against what a token costs and against the time it took."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.sweep.results import Result
from moejax.sweep.table import unit
from moejax.train.summary import ALERT, QUIET, STYLE

# Okabe and Ito's palette without its yellow, too light for points, and with a grey.
COLOURS = (
    "#595959", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7",
)  # fmt: skip
SHAPES = "osD^vP"
"""A variant beyond the colours takes the next shape."""
LOG_FROM = 3.0
"""An axis whose largest value is this many times its smallest is logarithmic."""
LEAKS = "\N{DAGGER}"

Pixel = tuple[float, float]


def write_figure(folder: Path, title: str, results: Sequence[Result]) -> None:
    """Draws ``<folder>/sweep.png`` in place of an older one."""
    import matplotlib

    temporary = folder / ".sweep.tmp.png"
    with matplotlib.rc_context(STYLE):
        figure(title, results).savefig(temporary)
    temporary.replace(folder / "sweep.png")


def figure(title: str, results: Sequence[Result]) -> Any:
    """The picture as a ``matplotlib.figure.Figure``, outside pyplot: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn: Any = Figure(figsize=(12, 5.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(drawn)
    flops, prefix = unit([result.train_flops_per_token for result in results])
    left, right = drawn.subplots(1, 2, sharey=True)
    panels = [
        _Panel(left, lambda r: r.train_flops_per_token / flops),
        _Panel(right, lambda r: r.train_seconds),
    ]
    left.set(
        title="Loss against compute",
        xlabel=f"measured active {prefix}FLOP per token, forward and backward, mean over the run",
        ylabel="held-out loss at the end, nats per byte",
    )
    right.set(
        title="Loss against time",
        xlabel="seconds of training steps, without compilation and evaluation",
    )
    for panel in panels:
        panel.scatter(results)
    notes = [f"every seed is a point: {title}"]
    marks = {r.leak: [o.variant for o in results if o.leak == r.leak] for r in results if r.leak}
    notes += [
        f"{LEAKS} {', '.join(dict.fromkeys(names))}: a token's output may depend on {mark}"
        for mark, names in marks.items()
    ]
    below = 0.02 + 0.035 * len(notes)
    drawn.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    for line, note in enumerate(reversed(notes)):
        colour = ALERT if note.startswith(LEAKS) else QUIET
        text = note.replace("$", r"\$")  # matplotlib would read it as mathematics
        drawn.text(0.012, 0.022 + 0.035 * line, text, color=colour, va="center", fontsize=9)
    canvas.draw()  # places the axes; labels are laid out in their pixels
    drawn.set_layout_engine("none")
    for panel in panels:
        panel.label(results)
    return drawn


@dataclasses.dataclass
class _Panel:
    """One pair of axes: loss against ``value``."""

    axes: Any
    value: Callable[[Result], float]

    def scatter(self, results: Sequence[Result]) -> None:
        from matplotlib import ticker

        values = [self.value(r) for r in results if math.isfinite(self.value(r))]
        if values and max(values) >= LOG_FROM * min(values) > 0:
            self.axes.set_xscale("log")
            self.axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            self.axes.xaxis.set_minor_locator(ticker.NullLocator())
            self.axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        self.axes.margins(x=0.2, y=0.12)  # room for labels
        for variant, (colour, shape) in _styles(results).items():
            own = [r for r in results if r.variant == variant]
            x, y = [self.value(r) for r in own], [r.loss for r in own]
            if all(map(math.isfinite, x)):
                # Spokes to the mean, beside which the name stands.
                mean = statistics.fmean(x), statistics.fmean(y)
                for point in zip(x, y, strict=True):
                    ends = zip(mean, point, strict=True)
                    self.axes.plot(*ends, color=colour, linewidth=1, alpha=0.6, zorder=2)
            leaks = own[0].leak
            self.axes.scatter(
                x,
                y,
                color=colour,
                marker=shape,
                s=64,
                edgecolors=ALERT if leaks else "white",
                linewidths=1.4 if leaks else 0.8,
                zorder=3,
            )

    def label(self, results: Sequence[Result]) -> None:
        """A name beside each variant's mean or a point of it, hiding no point and no other name."""
        from matplotlib.lines import Line2D

        figure = self.axes.figure
        renderer = figure.canvas.get_renderer()
        inside = _Box(*self.axes.get_window_extent(renderer).extents)
        anchors, taken = self._anchors_and_marks(results)
        for variant, (colour, _) in _styles(results).items():
            if variant not in anchors:
                continue
            leaks = any(r.leak for r in results if r.variant == variant)
            name = f"{variant} {LEAKS}" if leaks else variant
            style = {"color": colour, "fontweight": "bold", "va": "bottom", "zorder": 4}
            text = figure.text(0, 0, name, transform=None, **style)
            extent = text.get_window_extent(renderer)
            box, (x, y) = _place(anchors[variant], extent.width, extent.height, taken, inside)
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
    ) -> tuple[dict[str, list[Pixel]], list["_Box"]]:
        """Where a name may stand: mean and points; what it may not cover: points and spokes."""
        to_pixels = self.axes.transData.transform
        anchors, marks = {}, []
        for variant in _styles(results):
            own = [(self.value(r), r.loss) for r in results if r.variant == variant]
            if not all(math.isfinite(x) for x, _ in own):
                continue
            x, y = mean = to_pixels([statistics.fmean(a) for a in zip(*own, strict=True)])
            points = [to_pixels(point) for point in own]
            anchors[variant] = [mean, *points]
            for px, py in points:
                marks.append(_around(px, py, 6))
                spoke = ((px + (x - px) * i / 8, py + (y - py) * i / 8) for i in range(8))
                marks += [_around(*place, 2) for place in spoke]
        return anchors, marks


@dataclasses.dataclass(frozen=True)
class _Box:
    """A rectangle in pixels."""

    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: "_Box") -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return max(width, 0.0) * max(height, 0.0)

    def distance(self, x: float, y: float) -> float:
        return math.hypot(
            max(self.left - x, x - self.right, 0), max(self.low - y, y - self.high, 0)
        )


def _around(x: float, y: float, reach: float) -> _Box:
    return _Box(x - reach, y - reach, x + reach, y + reach)


def _place(
    anchors: Sequence[Pixel], width: float, height: float, taken: Sequence[_Box], inside: _Box
) -> tuple[_Box, Pixel]:
    """The free place for a name that is nearest to one of its anchors, and that anchor."""
    best, least = None, math.inf
    for radius, (x, y), angle in itertools.product(range(12, 132, 6), anchors, range(0, 360, 15)):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        # The edge of the name, not its middle, lies on the circle.
        left = x + radius * dx - width * (1 - dx) / 2
        low = y + radius * dy - height * (1 - dy) / 2
        box = _Box(left, low, left + width, low + height)
        outside = width * height - box.overlap(inside)
        cost = sum(map(box.overlap, taken)) + 100 * max(outside, 0.0)
        if cost < least:
            best, least = (box, (x, y)), cost
        if cost < 1e-6:
            break
    assert best is not None
    return best


def _styles(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """Colour and shape of each variant, in the order of the sweep."""
    names = dict.fromkeys(result.variant for result in results)
    return {
        name: (COLOURS[i % len(COLOURS)], SHAPES[i // len(COLOURS) % len(SHAPES)])
        for i, name in enumerate(names)
    }
