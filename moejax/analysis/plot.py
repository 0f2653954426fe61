"""Figures of the report as plotly objects, for notebooks and separate files."""

import copy
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from moejax.analysis.page import Block, Choice, Figure
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.errors import UserError

THEMES = "themes.json"
"""Colours by theme, shared with the script of the report."""


def figures(data: RunData | SweepData) -> dict[str, Figure]:
    """The figures of the report of a run or a sweep by name, in the order of the pages."""
    from moejax.analysis.report import PAGES, SWEEP_PAGES

    if isinstance(data, RunData):
        pages = [page(data) for page in PAGES]
    else:
        pages = [page(data) for page in SWEEP_PAGES]
    return {figure.name: figure for page in pages for figure in _walk(page.blocks)}


def figure(data: RunData | SweepData, name: str, theme: str = "light") -> Any:
    """One figure as a ``plotly.graph_objects.Figure``, with its caption in ``layout.meta``.

    ``name``: a name from ``figures``, or a prefix, which selects the first match.

    Raises:
      UserError: there is no such figure.
    """
    known = figures(data)
    chosen = known.get(name) or next((f for n, f in known.items() if n.startswith(name)), None)
    if chosen is None or not name:
        raise UserError(f"no figure is called {name!r}; choose from {', '.join(known)}")
    return plotted(chosen, theme)


def plotted(chosen: Figure, theme: str = "light") -> Any:
    """A figure of a page with the colours of a theme, "light" or "dark"."""
    from plotly import graph_objects

    colours = json.loads(resources.files("moejax.analysis").joinpath("assets", THEMES).read_text())
    spec = copy.deepcopy(chosen.spec)
    _recolour(spec, colours[theme])
    for trace in spec["data"]:
        if trace["type"] == "heatmap" and "colorscale" not in trace:
            two = trace.get("zmin", 0) < 0
            trace["colorscale"] = colours[theme]["diverging" if two else "sequential"]
    layout = spec["layout"] | {
        "height": chosen.height,
        "colorway": colours[theme]["colorway"],
        "template": "plotly_dark" if theme == "dark" else "plotly_white",
        "meta": {"caption": chosen.caption},
    }
    return graph_objects.Figure({"data": spec["data"], "layout": layout})


def _walk(blocks: Sequence[Block]) -> Iterator[Figure]:
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Choice):
            for option in block.options.values():
                yield from _walk(option)


def _recolour(node: Any, colours: dict[str, Any]) -> None:
    """Replace "C0" to "C7", "ink" and "quiet" by a theme's colours."""
    if isinstance(node, list):
        for item in node:
            _recolour(item, colours)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("color", "fillcolor") and isinstance(value, str):
            if value[:1] == "C" and value[1:].isdigit():
                node[key] = colours["colorway"][int(value[1:]) % len(colours["colorway"])]
            elif value in ("ink", "quiet"):
                node[key] = colours[value]
        else:
            _recolour(value, colours)
