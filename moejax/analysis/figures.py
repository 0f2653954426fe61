"""Plotly figures as plain lists, for the pages. Colours are the renderer's unless given."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.html import plain

Spec = dict[str, Any]

COLUMNS = 200
"""A heatmap over more logged steps than this averages neighbours."""
MARKED = 12
"""A line of at most so many points has markers."""


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


def chart(traces: Sequence[Spec], x: str, y: str, **layout: Any) -> Spec:
    """Traces over axes with these titles; ``layout`` adds to it, axis by axis."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name, axis in axes.items():
        axis.update(layout.pop(name, {}))
    return {"data": list(traces), "layout": {**axes, "showlegend": len(traces) > 1, **layout}}


def heatmap(z: Any, x: Any, y: Any, colour: str, **style: Any) -> Spec:
    """Cells of rows ``y`` and columns ``x``; values on both sides of 0 have two colours."""
    bar = {"title": {"text": colour, "side": "right"}}
    return {
        "type": "heatmap",
        "z": listed(z),
        "x": listed(x),
        "y": listed(y),
        "colorbar": bar,
    } | style


def relative_load(z: Any, **style: Any) -> Spec:
    """A heatmap's values: load over mean load, coloured by its logarithm to base 2.

    ``z`` [rows, columns]; an expert without pairs is off the scale and drawn as a gap.
    """
    relative = np.asarray(z, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.where(relative > 0, np.log2(relative), np.nan)
    ticks = [-3, -2, -1, 0, 1, 2, 3]
    bar = {
        "title": {"text": "load / mean load", "side": "right"},
        "tickvals": ticks,
        "ticktext": [f"{2.0**tick:g}" for tick in ticks],
    }
    return {
        "type": "heatmap",
        "z": octaves.tolist(),
        "customdata": relative.tolist(),
        "zmin": -limit(relative),
        "zmax": limit(relative),
        "zmid": 0,
        "colorbar": bar,
        "hoverongaps": False,
        **style,
    }


def limit(relative: np.ndarray) -> int:
    """1, 2 or 3 octaves: the smallest that leaves at most one cell in a hundred off the scale."""
    octaves = np.abs(np.log2(relative[relative > 0]))
    return min(3, max(1, int(np.ceil(np.quantile(octaves, 0.99))))) if octaves.size else 1


def binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``COLUMNS`` steps with the mean of ``values`` [N, ...] over those up to each."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
    means = np.stack([values[group].mean(axis=0) for group in groups])
    return steps[[group[-1] for group in groups]], means


def listed(values: Any) -> list[Any]:
    """Plain Python numbers, strings and lists of them."""
    return np.asarray(values).tolist() if isinstance(values, np.ndarray) else list(values)
