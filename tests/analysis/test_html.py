"""Pages to HTML: complete, inert, the same every time."""

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from moejax.analysis.html import POLICY, render
from moejax.analysis.page import Choice, Figure, Page, Table, Text, Warning

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
SPEC = {"data": [{"type": "scatter", "x": [1, 2], "y": [0.1, math.nan]}], "layout": {}}


class Parsed(HTMLParser):
    """Tags with attributes, and texts with the tags around them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def parsed(*pages: Page) -> Parsed:
    return Parsed(render("a run", "about it", pages))


def specs(text: str) -> dict[str, Any]:
    """Every figure's JSON by name, as a browser would read it."""
    found = re.findall(r'<script type="application/json" id="spec-([\w-]+)">(.*?)</script>', text)
    return {name: json.loads(content) for name, content in found}


def figure(name: str = "", spec: dict[str, Any] | None = None) -> Figure:
    return Figure(spec or SPEC, "a caption", height=321, name=name)


def test_every_page_with_blocks_is_in_the_menu_in_order():
    found = parsed(Page("First page", [Text("a")]), Page("Empty", []), Page("Other", [Text("b")]))
    assert [a["href"] for tag, a in found.tags if tag == "a"] == ["#first-page", "#other"]
    assert [a["id"] for a in found.with_class("page")] == ["first-page", "other"]


def test_nothing_is_fetched_and_the_policy_forbids_it():
    text = render("a run", "", [Page("A", [figure()])])
    found = Parsed(text)
    assert not [tag for tag, a in found.tags if "src" in a or tag in ("link", "iframe", "base")]
    assert not [a for tag, a in found.tags if tag == "a" and not str(a["href"]).startswith("#")]
    policies = [a["content"] for tag, a in found.tags if "http-equiv" in a]
    assert policies == [POLICY] and POLICY.startswith("default-src 'none'")
    assert "unsafe-eval" not in POLICY and text.count("* plotly.js v") == 1


def test_hostile_texts_stay_texts_wherever_they_stand():
    spec = {"data": [{"type": "bar", "x": [HOSTILE], "y": [1]}], "layout": {"title": HOSTILE}}
    blocks = [
        Text(HOSTILE),
        Warning(HOSTILE),
        Table([HOSTILE], [[HOSTILE]], HOSTILE),
        Figure(spec, HOSTILE, name="f"),
        Choice(HOSTILE, {HOSTILE: [Text(HOSTILE)]}),
    ]
    plain = [Text("a"), Warning("b"), Table(["c"], [["d"]], "e"), figure("f")]
    text = render(HOSTILE, HOSTILE, [Page(HOSTILE, blocks)])
    found = Parsed(text)
    calm = parsed(Page("x", [*plain, Choice("g", {"h": [Text("i")]})]))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in calm.tags]
    assert found.texts.count(HOSTILE) == 14
    assert specs(text)["f"] == spec


def test_a_figure_is_its_spec_with_gaps_for_what_is_not_finite():
    text = render("a run", "", [Page("Some page", [figure("one"), figure()])])
    found = specs(text)
    gap = {"data": [{"type": "scatter", "x": [1, 2], "y": [0.1, None]}], "layout": {}}
    assert found == {"one": gap, "some-page-2": gap}
    places = Parsed(text).with_class("plot")
    assert [a["data-name"] for a in places] == ["one", "some-page-2"]
    assert places[0]["data-height"] == "321"


@pytest.mark.parametrize("kind", ["scattergl", "scattermap", "choroplethmap", "densitymapbox"])
def test_traces_that_the_policy_would_stop_are_refused(kind: str):
    spec = {"data": [{"type": kind}], "layout": {}}
    with pytest.raises(ValueError, match=kind):
        render("", "", [Page("A", [figure(spec=spec)])])


def test_two_figures_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two figures are called 'a'"):
        render("", "", [Page("A", [figure("a")]), Page("B", [figure("a")])])


def test_few_alternatives_are_buttons_many_a_list_and_one_is_shown():
    few = parsed(Page("A", [Choice("layer", {str(i): [Text("x")] for i in range(6)})]))
    many = parsed(Page("A", [Choice("layer", {str(i): [Text("x")] for i in range(7)})]))
    pressed = [a["aria-pressed"] for _, a in few.tags if "aria-pressed" in a]
    assert pressed == ["true"] + 5 * ["false"]
    assert [tag for tag, _ in many.tags].count("option") == 7
    for found, count in ((few, 6), (many, 7)):
        assert ["hidden" in a for a in found.with_class("option")] == [False] + (count - 1) * [True]


def test_columns_of_numbers_stand_to_the_right():
    rows = [["a", "1.5 ms", "-"], ["b", "-3e-05", "12 %"], ["c", "", "0.1"]]
    found = parsed(Page("A", [Table(["name", "time", "share"], rows)]))
    cells = [a for tag, a in found.tags if tag == "td"]
    assert [a["class"] for a in cells] == 3 * ["short", "number", "number"]
    (long,) = [a for tag, a in parsed(Page("A", [Table("a", [["b" * 27]])])).tags if tag == "td"]
    assert "class" not in long


def test_equal_pages_give_equal_bytes():
    pages = [Page("A", [figure(), Choice("c", {"x": [figure()], "y": [Text("t")]})])]
    assert render("a", "b", pages) == render("a", "b", pages)
