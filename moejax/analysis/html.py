"""Rendering of pages to one self-contained HTML file: no network, server or fonts.

Texts are escaped; figures are JSON that a script draws with plotly.js, which the file contains
once. A content security policy forbids every request. Equal pages give equal bytes.
"""

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text, Warning

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
TABS = 6
"""More alternatives than this get a drop-down list instead of buttons."""

SHORT = 26
"""The most characters of a cell that is not broken into lines."""

_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?[\d.,]+(e[-+]?\d+)?([ \N{NO-BREAK SPACE}]?\S{1,12})?")
_ABSENT = ("", "-")


def render(title: str, about: str, pages: Sequence[Page]) -> str:
    """The HTML file: ``title`` and the line ``about`` above a menu of the pages with blocks.

    Raises:
      ValueError: two figures with one name; a figure that cannot be drawn under the policy.
    """
    from plotly.offline import get_plotlyjs

    pages = [page for page in pages if page.blocks]
    writer = _Writer()
    sections = [writer.section(page) for page in pages]
    menu = [f'<a href="#{_slug(page.title)}">{_text(page.title)}</a>' for page in pages]
    specs = [
        f'<script type="application/json" id="spec-{name}">{_json(spec)}</script>'
        for name, spec in writer.specs.items()
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>\n{_asset('report.css')}</style>",
            # Without scripts all pages are shown, one under the other.
            "<noscript><style>.page { display: block !important; }</style></noscript>",
            '</head>\n<body class="paged">',
            f"<header><div><h1>{_text(title)}</h1><p>{_text(about)}</p></div>",
            '<button type="button" id="theme" title="light or dark">dark</button></header>',
            f'<nav aria-label="pages">{"".join(menu)}</nav>',
            "<main>",
            "<noscript><p>The figures need JavaScript; none of it is loaded.</p></noscript>",
            *sections,
            "</main>",
            *specs,
            f'<script type="application/json" id="themes">{_asset("themes.json")}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n",
        ]
    )


class _Writer:
    """HTML of blocks; collects figures by name."""

    def __init__(self) -> None:
        self.specs: dict[str, Mapping[str, Any]] = {}
        self._page = ""
        self._kinds: dict[type, Callable[[Any], str]] = {
            Text: lambda block: f"<p>{_text(block.text)}</p>",
            Warning: lambda block: f'<p class="warning" role="note">{_text(block.text)}</p>',
            Table: _table,
            Figure: self._figure,
            Choice: self._choice,
        }

    def section(self, page: Page) -> str:
        # The first page is there to be read while the scripts are still being parsed.
        first = "" if self._page else " shown"
        self._page = _slug(page.title)
        head = f'<section class="page{first}" id="{self._page}"><h2>{_text(page.title)}</h2>'
        return "\n".join([head, *map(self._block, page.blocks), "</section>"])

    def _block(self, block: Block) -> str:
        return self._kinds[type(block)](block)

    def _figure(self, figure: Figure) -> str:
        name = _slug(figure.name) or f"{self._page}-{len(self.specs) + 1}"
        if name in self.specs:
            raise ValueError(f"two figures are called {name!r}")
        kinds = [trace.get("type", "scatter") for trace in figure.spec["data"]]
        if any(kind.endswith("gl") or "map" in kind.replace("heatmap", "") for kind in kinds):
            raise ValueError(
                f"figure {name!r}: {kinds} have a trace that needs eval or the network"
            )
        self.specs[name] = figure.spec
        return (
            f'<figure class="plot" data-name="{name}" data-height="{figure.height}">'
            f'<div class="canvas" id="{name}" style="height:{figure.height}px"></div>'
            f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
        )

    def _choice(self, choice: Choice) -> str:
        names = list(choice.options)
        if len(names) <= TABS:
            buttons = [
                f'<button type="button" aria-pressed="{str(not i).lower()}">{_text(name)}</button>'
                for i, name in enumerate(names)
            ]
            control = f'<span class="tabs">{"".join(buttons)}</span>'
        else:
            control = f"<select>{''.join(f'<option>{_text(n)}</option>' for n in names)}</select>"
        panels = [
            f'<div class="option"{" hidden" if i else ""}>{"".join(map(self._block, blocks))}</div>'
            for i, blocks in enumerate(choice.options.values())
        ]
        label = f'<span class="label">{_text(choice.label)}</span>'
        return f'<div class="choice"><p>{label} {control}</p>{"".join(panels)}</div>'


def plain(text: str) -> str:
    """Escape a name or label inside a figure, where plotly interprets ``<b>`` and ``&amp;``."""
    return html.escape(text, quote=False)


def _table(table: Table) -> str:
    """Align columns of numbers to the right, others to the left."""
    columns = range(len(table.header))
    numeric = [
        all(_NUMBER.fullmatch(row[c]) or row[c] in _ABSENT for row in table.rows) for c in columns
    ]
    classes = [' class="number"' if flag else "" for flag in numeric]

    def cell(row: Sequence[str], c: int) -> str:
        kind = "number" if numeric[c] else "short" if len(row[c]) <= SHORT else ""
        return f"<td{f' class={kind!r}' if kind else ''}>{_text(row[c])}</td>"

    head = "".join(f"<th{classes[c]}>{_text(table.header[c])}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(cell(row, c) for c in columns)}</tr>" for row in table.rows)
    caption = f"<figcaption>{_text(table.caption)}</figcaption>" if table.caption else ""
    return (
        f'<figure class="table"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{caption}</figure>"
    )


def _text(text: str) -> str:
    return html.escape(text)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _json(spec: Mapping[str, Any]) -> str:
    """JSON without markup characters; numbers that are not finite become gaps."""
    text = json.dumps(_finite(spec), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _asset(name: str) -> str:
    return resources.files("moejax.analysis").joinpath("assets", name).read_text("utf-8")
