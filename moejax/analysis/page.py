"""What a page of the report is made of: values, which the renderer turns into HTML."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph of plain text; the renderer escapes it."""

    text: str


@dataclasses.dataclass(frozen=True)
class Warning:
    """Something the reader must know before believing the numbers: a leak, a collapse."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under a header. Numbers are written by the page, with their units."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plotly figure as its JSON tree, ``{"data": [...], "layout": {...}}``, of plain lists.

    Colours of text, grid and background are the renderer's (light, dark, print), and so are those
    of traces, unless given; "C0" to "C7", "ink" and "quiet" are its colours by name. A heatmap
    without a colorscale gets a diverging one if its values have both signs. ``caption`` says in one
    or two sentences what is drawn and how to read it, with units.
    """

    spec: dict[str, Any]
    caption: str
    height: int = 380
    name: str = ""
    """A short name that tests and links find it by."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Alternatives of which the reader sees one: layers, experts, checkpoints."""

    label: str
    options: Mapping[str, Sequence["Block"]]


Block: TypeAlias = Text | Warning | Table | Figure | Choice


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: its name in the menu and its blocks. One without blocks is left out."""

    title: str
    blocks: Sequence[Block]
