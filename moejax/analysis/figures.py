"""Plotly figures as plain lists, for the pages. Colours are the renderer's unless given."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.analysis.html import plain
from moejax.train import scales

Spec = dict[str, Any]

COLUMNS = 200
"""A heatmap over more logged steps than this averages neighbours."""
TITLE = 34
"""Characters of an axis title that fit beside a figure."""
OCTAVES = 3
"""The colour scale always ends at lifts of 1/8 and 8."""
WRITTEN = 16
"""The most columns of a map whose shares are written into its cells."""
DIGITS = 5
"""Decimals of the numbers of a map: full precision would dominate the report's size."""
MARKED = 12
"""The most points of a line that has markers."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of an axis: a quantity, its unit, and the least span.

    ``least`` may be 0 only if both ``bounds`` are finite: the axis then always spans them.
    """

    quantity: str
    unit: str
    least: float = 0.0
    start: float | None = None
    """The start of the axis, such as 0."""
    bounds: scales.Ends = scales.EVERYWHERE
    """The bounds of the quantity."""
    format: str = ""

    @property
    def title(self) -> str:
        """Quantity and unit, on two lines if both are long."""
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
    """A share, always on the scale from 0 to 100 %."""
    return Scale(quantity, of, bounds=(0.0, 1.02), format=".0%")


def loss(quantity: str, unit: str, values: Iterable[float] = ()) -> Scale:
    """A loss; ``values`` are needed if its unit is not in nats."""
    return Scale(quantity, unit, scales.least_loss(unit, values))


def from_0(quantity: str, unit: str, least: float) -> Scale:
    """A quantity without negative values."""
    return Scale(quantity, unit, least, start=0.0)


def line(name: str, x: Any, y: Any, **style: Any) -> Spec:
    """A named line; few points get markers."""
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

    Axes of steps, positions or names have a title; all others have a scale.
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

    The ends do not depend on the values, so that a colour means the same in every figure.
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


def lift_cells(lift: np.ndarray, share: np.ndarray, **style: Any) -> Spec:
    """A heatmap of ``lift`` [rows, columns], coloured by its logarithm to base 2: 1 is neutral.

    ``share``, of the same shape, is written into the cells; hover texts find the lift as
    ``customdata[0]`` and the share as ``customdata[1]``. Lift 0 and unknown lift are gaps.
    """
    above_0 = np.nan_to_num(lift) > 0
    octaves = np.log2(lift, out=np.full(lift.shape, np.nan), where=above_0)
    edge = OCTAVES
    ticks = range(-edge, edge + 1)
    cells = {
        "type": "heatmap",
        "z": listed(octaves.round(DIGITS)),
        "customdata": listed(np.stack([lift, share], axis=-1).round(DIGITS)),
        "zmin": -edge,
        "zmax": edge,
        "zmid": 0,
        "colorbar": {
            "title": {"text": "lift, ratio", "side": "top"},
            "tickvals": list(ticks),
            "ticktext": [f"{2.0**tick:g}" for tick in ticks],
        },
        "hoverongaps": False,
    }
    if share.shape[1] <= WRITTEN:
        cells |= {"text": [[_percent(x) for x in row] for row in share], "texttemplate": "%{text}"}
    return cells | style


def cell_axes(rows: int, columns: int) -> dict[str, dict[str, Any]]:
    """Axes of numbered or named cells, the first row on top; not every number where many are."""
    return {
        "xaxis": {"dtick": max(1, columns // 16), "showgrid": False, "zeroline": False},
        "yaxis": {
            "dtick": max(1, rows // 16),
            "showgrid": False,
            "zeroline": False,
            "autorange": "reversed",
        },
    }


def _percent(share: float) -> str:
    if not share > 0:
        return ""
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its axes as ``chart`` takes them, its traces, and further options of y."""

    x: str | Scale
    y: str | Scale
    traces: Sequence[Spec]
    axis: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    x_axis: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def panels(charts: Sequence[Panel], columns: int = 2) -> Spec:
    """Panels in rows of ``columns``; a name is in the legend once."""
    layout: dict[str, Any] = {
        "grid": {
            "rows": -(-len(charts) // columns),
            "columns": columns,
            "pattern": "independent",
            "xgap": 0.22,
            "ygap": 0.28,
        }
    }
    data, named = [], set()
    for number, panel in enumerate(charts, start=1):
        suffix = "" if number == 1 else str(number)
        layout[f"xaxis{suffix}"] = {
            **axis_of(panel.x, panel.traces, "x"), **panel.x_axis,
        }  # fmt: skip
        layout[f"yaxis{suffix}"] = {
            **axis_of(panel.y, panel.traces, "y"), **panel.axis,
        }  # fmt: skip
        for trace in panel.traces:
            name = trace.get("name", "")
            data.append(
                {
                    "legendgroup": name,
                    "showlegend": name not in named,
                    **trace,
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                }
            )
            if data[-1]["showlegend"]:
                named.add(name)
    return {"data": data, "layout": {**layout, "showlegend": len(named) > 1}}


def fan(steps: Any, bands: dict[str, tuple[Any, Any]], middle: tuple[str, Any]) -> list[Spec]:
    """A line within bands: each band is its lower and upper values by name, the widest first."""
    traces = []
    for name, (low, high) in bands.items():
        edge = {"mode": "lines", "line": {"width": 0, "color": "C0"}, "hoverinfo": "skip"}
        same = {"legendgroup": name, "opacity": 0.5}
        traces.append(line(name, steps, low, **edge, **same, showlegend=False))
        traces.append(line(name, steps, high, **edge, **same, fill="tonexty"))
    name, values = middle
    return [*traces, line(name, steps, values, line={"color": "C0"})]
