"""The blocks of a page of the report, as values that the renderer turns into HTML."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph of plain text; the renderer escapes it."""

    text: str


@dataclasses.dataclass(frozen=True)
class Warning:
    """A caveat that the reader needs before trusting the numbers: a leak, a collapse."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under a header. The page formats numbers, with their units."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plotly figure as its JSON tree, ``{"data": [...], "layout": {...}}``, of plain lists.

    The renderer chooses the colours of text, grid and background (light, dark, print), and of
    traces without a colour; "C0" to "C7", "ink" and "quiet" name its colours. A heatmap without a
    colorscale gets a diverging one if its values have both signs. ``caption`` explains the figure
    in one or two sentences, with units.
    """

    spec: dict[str, Any]
    caption: str
    height: int = 380
    name: str = ""
    """A short name for tests and links."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Alternatives, such as layers or checkpoints, shown one at a time."""

    label: str
    options: Mapping[str, Sequence["Block"]]


Block: TypeAlias = Text | Warning | Table | Figure | Choice


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: its name in the menu and its blocks. One without blocks is left out."""

    title: str
    blocks: Sequence[Block]
