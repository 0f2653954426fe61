"""Plotly figures as plain lists, for the pages. Colours are the renderer's unless given."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moejax.analysis.html import plain
from moejax.train import scales

Spec = dict[str, Any]

COLUMNS = 200
"""A heatmap over more logged steps than this averages neighbours."""
TITLE = 34
"""Letters of an axis title that fit beside a figure."""
MARKED = 12
"""A line of at most so many points has markers."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What an axis shows: a quantity with its unit, and how far the axis spans at least.

    ``least`` may be 0 only where ``bounds`` are both finite: then the axis is always these.
    """

    quantity: str
    unit: str
    least: float = 0.0
    start: float | None = None
    """Where the axis begins, such as 0."""
    bounds: scales.Ends = scales.EVERYWHERE
    """What the quantity cannot leave."""
    format: str = ""

    @property
    def title(self) -> str:
        """Quantity and unit, the latter on a line of its own where both are long."""
        whole = f"{self.quantity}, {self.unit}"
        return whole if len(whole) <= TITLE else f"{self.quantity},<br>{self.unit}"

    def axis(self, values: Iterable[float] = ()) -> Spec:
        """The axis over these values, with its range."""
        low, high = self.bounds
        if self.least or not (math.isfinite(low) and math.isfinite(high)):
            low, high = scales.span(values, self.least, self.start, self.bounds)
        axis: Spec = {"title": {"text": self.title}, "range": [low, high]}
        return axis | ({"tickformat": self.format} if self.format else {})


def share(quantity: str, of: str = "share") -> Scale:
    """A share that is often small: from 0 to its largest value, at least 5 %."""
    return Scale(quantity, of, scales.SHARE, start=0.0, bounds=(0.0, 1.02), format=".1%")


def whole_share(quantity: str, of: str = "share") -> Scale:
    """A share between 0 and 100 %, on that scale always."""
    return Scale(quantity, of, bounds=(0.0, 1.02), format=".0%")


def loss(quantity: str, unit: str, values: Iterable[float] = ()) -> Scale:
    """A loss; ``values`` are wanted where its unit is not in nats."""
    return Scale(quantity, unit, scales.least_loss(unit, values))


def from_0(quantity: str, unit: str, least: float) -> Scale:
    """A quantity without negative values."""
    return Scale(quantity, unit, least, start=0.0)


def line(name: str, x: Any, y: Any, **style: Any) -> Spec:
    """A line by name; few points get markers."""
    x, y = listed(x), listed(y)
    mode = "lines+markers" if len(x) <= MARKED else "lines"
    return {"type": "scatter", "name": plain(name), "x": x, "y": y, "mode": mode, **style}


def level(name: str, steps: Any, value: float) -> Spec:
    """A dotted horizontal line over the range of ``steps``, such as a baseline."""
    ends = [min(steps), max(steps)]
    style = {"color": "quiet", "dash": "dot", "width": 1.5}
    return line(name, ends, [value, value], mode="lines", line=style)


def chart(traces: Sequence[Spec], x: str | Scale, y: str | Scale, **layout: Any) -> Spec:
    """Traces over two axes; ``layout`` adds to it, axis by axis.

    An axis with a text for a title is of steps, positions or names; all others have a scale.
    """
    axes = {"xaxis": axis_of(x, traces, "x"), "yaxis": axis_of(y, traces, "y")}
    for name, axis in axes.items():
        axis.update(layout.pop(name, {}))
    return {"data": list(traces), "layout": {**axes, "showlegend": len(traces) > 1, **layout}}


def names(rows: int) -> Spec:
    """An axis of numbered rows, the first on top."""
    return {"type": "category", "autorange": "reversed", "dtick": max(1, rows // 16)}


def axis_of(what: str | Scale, traces: Sequence[Spec], side: str) -> Spec:
    """The axis of ``side``, "x" or "y", of these traces."""
    if isinstance(what, str):
        return {"title": {"text": what}}
    return what.axis(value for trace in traces for value in trace[side])


def heatmap(
    z: Any, x: Any, y: Any, colour: str, ends: scales.Ends = (0.0, 1.0), **style: Any
) -> Spec:
    """Cells of rows ``y`` and columns ``x``, whose colours reach from one of ``ends`` to the other.

    The ends do not depend on the values, so that a colour says the same in every picture.
    ``colour`` names quantity and unit. From below 0 to above there are two colours.
    """
    low, high = ends
    return {
        "type": "heatmap",
        "z": listed(z),
        "x": listed(x),
        "y": listed(y),
        "zmin": low,
        "zmax": high,
        "colorbar": {"title": {"text": colour, "side": "right"}},
        **({"zmid": 0} if low < 0 < high else {}),
    } | style


def relative_load(z: Any, **style: Any) -> Spec:
    """A heatmap's values: load over mean load, coloured by its logarithm to base 2.

    ``z`` [rows, columns]; an expert without pairs is off the scale and drawn as a gap. The colours
    end at a quarter of the mean and at four times it.
    """
    relative = np.asarray(z, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.where(relative > 0, np.log2(relative), np.nan)
    edge = scales.LOAD_OCTAVES
    ticks = range(-edge, edge + 1)
    bar = {
        "title": {"text": "load / mean load, ratio", "side": "right"},
        "tickvals": list(ticks),
        "ticktext": [f"{2.0**tick:g}" for tick in ticks],
    }
    return {
        "type": "heatmap",
        "z": octaves.tolist(),
        "customdata": relative.tolist(),
        "zmin": -edge,
        "zmax": edge,
        "zmid": 0,
        "colorbar": bar,
        "hoverongaps": False,
        **style,
    }


def binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``COLUMNS`` steps with the mean of ``values`` [N, ...] over those up to each."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
    means = np.stack([values[group].mean(axis=0) for group in groups])
    return steps[[group[-1] for group in groups]], means


def listed(values: Any) -> list[Any]:
    """Plain Python numbers, strings and lists of them."""
    return np.asarray(values).tolist() if isinstance(values, np.ndarray) else list(values)
