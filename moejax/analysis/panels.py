"""Small multiples: several charts in one figure, with one legend."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.analysis import figures
from moejax.analysis.figures import Spec


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its axes as ``figures.chart`` takes them, traces, what else is said of y."""

    x: str | figures.Scale
    y: str | figures.Scale
    traces: Sequence[Spec]
    axis: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    x_axis: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def panels(found: Sequence[Panel], columns: int = 2) -> Spec:
    """Panels in rows of ``columns``; a name is in the legend once."""
    layout: dict[str, Any] = {
        "grid": {
            "rows": -(-len(found) // columns),
            "columns": columns,
            "pattern": "independent",
            "xgap": 0.22,
            "ygap": 0.28,
        }
    }
    data, named = [], set()
    for number, panel in enumerate(found, start=1):
        suffix = "" if number == 1 else str(number)
        layout[f"xaxis{suffix}"] = {
            **figures.axis_of(panel.x, panel.traces, "x"), **panel.x_axis,
        }  # fmt: skip
        layout[f"yaxis{suffix}"] = {
            **figures.axis_of(panel.y, panel.traces, "y"), **panel.axis,
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
        traces.append(figures.line(name, steps, low, **edge, **same, showlegend=False))
        traces.append(figures.line(name, steps, high, **edge, **same, fill="tonexty"))
    name, values = middle
    return [*traces, figures.line(name, steps, values, line={"color": "C0"})]
