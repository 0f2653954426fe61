"""The report in a real browser: drawn, quiet, alone, in control, and equal to the data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moejax.analysis import report
from moejax.analysis.html import render
from moejax.analysis.page import Choice, Figure, Page, Table, Text
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.record import probe
from tests import probes
from tests.analysis import browser, sweeps, workdirs
from tests.analysis.browser import Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browser.missing()), reason=f"needs {browser.missing()}"),
]

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title=1\">"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """A run with a probe whose tokens would like to run."""
    workdir = workdirs.write(tmp_path_factory.mktemp("runs") / "a run")
    probes.write(workdir, steps=(0, 20, 30))
    tokens = probes.tokens()
    tokens["token_text"] = np.array([f"{HOSTILE}{text}" for text in tokens["token_text"]])
    probe.save_tokens(workdir, tokens)
    found = RunData.read(workdir)
    report.write(found, workdir / "report.html")
    return found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepData:
    switch = sweeps.outcome("switch", 2.0) | {
        "difference": {"mean": -0.02, "half_width": 0.01, "p_holm": 0.02}, "leak": "eval:future",
    }  # fmt: skip
    summary = sweeps.summary(switch, sweeps.outcome("top_2", 2.02))
    folder = sweeps.write(tmp_path_factory.mktemp("sweeps") / "a sweep", summary=summary)
    found = SweepData.read(folder)
    report.write(found, folder / "report.html")
    return found


def visit(chromium: Browser) -> int:
    """Shows every page and every alternative of every choice; the number of figures drawn."""
    for page in chromium.menu:
        chromium.show(page)
        panels = chromium.js("return document.querySelectorAll('.page.shown .option').length")
        for index in range(panels):
            reveal(chromium, index)
    drawn = "figure.plot[data-drawn] .canvas svg.main-svg"
    return chromium.js(
        "return new Set([...document.querySelectorAll(arguments[0])]"
        ".map((svg) => svg.closest('.canvas').id)).size", drawn
    )  # fmt: skip


CHOOSE = """
const choose = (choice, index) => {
  const select = choice.querySelector(':scope > p select');
  if (select) {
    select.selectedIndex = index;
    select.dispatchEvent(new Event('change'));
  } else choice.querySelectorAll(':scope > p button')[index].click();
};
"""
"""Clicks a button or picks from a list, as a reader would."""


def reveal(chromium: Browser, index: int) -> None:
    """Chooses an alternative of the page, and those around it."""
    chromium.js(
        CHOOSE
        + """
        let panel = document.querySelectorAll('.page.shown .option')[arguments[0]];
        for (; panel; panel = panel.parentElement.closest('.option')) {
          const all = [...panel.parentElement.children].filter((c) => c.matches('.option'));
          choose(panel.parentElement, all.indexOf(panel));
        }
        """,
        index,
    )
    chromium.settle()


def choose(chromium: Browser, label: str, option: int) -> None:
    """Chooses an alternative of the choice with this label."""
    chromium.js(
        CHOOSE
        + """
        const choices = [...document.querySelectorAll('.page.shown .choice')];
        const named = (c) => c.querySelector('.label').textContent === arguments[0];
        choose(choices.find(named), arguments[1]);
        """,
        label,
        option,
    )
    chromium.settle()


def test_every_page_and_figure_of_a_run_is_drawn_in_silence_and_alone(
    chromium: Browser, run: RunData
):
    chromium.open(run.workdir / "report.html")
    pages = [page(run) for page in report.PAGES]
    assert chromium.menu == [page.title for page in pages if page.blocks]
    assert [page.title for page in pages if not page.blocks] == ["Generated"]
    figures = chromium.js("return document.querySelectorAll('figure.plot').length")
    assert visit(chromium) == figures > 20
    assert chromium.problems() == [] and chromium.requests() == []
    assert chromium.driver.title == "a run"
    assert chromium.js("return document.querySelectorAll('img').length") == 0


def test_every_page_and_figure_of_a_sweep_is_drawn_in_silence_and_alone(
    chromium: Browser, sweep: SweepData
):
    chromium.open(sweep.folder / "report.html")
    assert chromium.menu == ["Overview", "Comparison", "Curves", "Load"]
    figures = chromium.js("return document.querySelectorAll('figure.plot').length")
    assert visit(chromium) == figures > 20
    assert chromium.problems() == [] and chromium.requests() == []


def test_the_menu_shows_one_page_at_a_time_and_back_goes_back(chromium: Browser, run: RunData):
    chromium.open(run.workdir / "report.html")

    def shown() -> list[str]:
        return chromium.js(
            "return [...document.querySelectorAll('.page')]"
            ".filter((p) => p.offsetParent !== null).map((p) => p.id)"
        )

    assert shown() == ["overview"]
    chromium.show("Load")
    assert shown() == ["load"]
    assert chromium.js("return document.querySelector('nav a[aria-current]').textContent") == "Load"
    chromium.driver.back()
    chromium.settle()
    assert shown() == ["overview"]
    chromium.driver.get((run.workdir / "report.html").resolve().as_uri() + "#drops")
    chromium.settle()
    assert shown() == ["drops"]


def test_numbers_in_figures_equal_those_in_the_rows(chromium: Browser, run: RunData):
    rows = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    held_out = [row for row in rows if row["split"] == "eval"]
    chromium.open(run.workdir / "report.html")
    chromium.show("Curves")
    training, evaluation, *_ = chromium.data("loss")
    assert training["x"] == [10, 20, 30] and training["y"] == [row["loss"] for row in train]
    assert evaluation["y"] == [row["loss"] for row in held_out]
    chromium.show("Drops")
    assert chromium.data("drop-rate")[0]["y"] == [row["moe/drop_rate"] for row in train]
    chromium.show("Load")
    load = np.asarray(train[-1]["moe/load"])
    shown = chromium.data("load-training")[0]
    assert np.allclose(2.0 ** np.asarray(shown["z"]), load / load.mean(1, keepdims=True), 1e-12)


def test_the_slider_changes_the_heatmap_to_the_step(chromium: Browser, run: RunData):
    chromium.open(run.workdir / "report.html")
    chromium.show("Load")
    chromium.driver.execute_async_script(
        "const done = arguments[0]; const gd = document.getElementById('load-training');"
        "const step = gd.layout.sliders[0].steps[0];"
        "Plotly.restyle(gd, ...step.args).then(() => done());"
    )
    load = np.asarray(run.train[0]["moe/load"])
    shown = chromium.data("load-training")[0]
    assert np.allclose(shown["customdata"], load / load.mean(1, keepdims=True), rtol=1e-12)
    assert np.shape(shown["z"]) == load.shape
    handles = "return document.querySelectorAll('#load-training .slider-grip-rect').length"
    assert chromium.js(handles) == 1


def test_a_choice_shows_one_alternative(chromium: Browser, run: RunData):
    chromium.open(run.workdir / "report.html")
    chromium.show("Load")
    choose(chromium, "over time, layer", 1)
    visible = "return document.getElementById(arguments[0]).offsetParent !== null"
    assert chromium.js(visible, "load-layer-1") and not chromium.js(visible, "load-layer-0")
    load = np.asarray([np.asarray(row["moe/load"])[1] for row in run.train])
    shown = chromium.data("load-layer-1")[0]["customdata"]
    assert np.allclose(shown, (load / load.mean(axis=1, keepdims=True)).T, rtol=1e-12)


def test_the_theme_is_the_systems_until_one_is_chosen_and_figures_follow(
    chromium: Browser, run: RunData
):
    def colours() -> tuple[str, str]:
        ground = chromium.js("return getComputedStyle(document.body).backgroundColor")
        line = "return document.querySelector('#loss .scatterlayer .js-line').style.stroke"
        return ground, chromium.js(line)

    def prefer(theme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": theme}
        chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        chromium.settle()

    chromium.open(run.workdir / "report.html")
    chromium.js("localStorage.clear()")
    prefer("light")
    chromium.open(run.workdir / "report.html")
    chromium.show("Curves")
    light = colours()
    prefer("dark")
    chromium.js("return new Promise((done) => setTimeout(done, 300))")
    dark = colours()
    assert light[0] == "rgb(255, 255, 255)" and light[0] != dark[0] and light[1] != dark[1]
    chromium.js("document.getElementById('theme').click()")
    chromium.js("return new Promise((done) => setTimeout(done, 300))")
    assert colours() == light
    chromium.js("localStorage.clear()")
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_hostile_texts_do_not_run_anywhere(chromium: Browser, tmp_path: Path):
    trace = {"type": "bar", "name": HOSTILE, "x": [HOSTILE], "y": [1], "text": [HOSTILE]}
    spec = {"data": [trace, trace], "layout": {"title": {"text": HOSTILE}}}
    blocks = [Text(HOSTILE), Table([HOSTILE], [[HOSTILE]]), Figure(spec, HOSTILE, name="f"),
              Choice(HOSTILE, {HOSTILE: [Text(HOSTILE)]})]  # fmt: skip
    path = tmp_path / "hostile.html"
    path.write_text(render("calm", HOSTILE, [Page(HOSTILE, blocks)]))
    chromium.open(path)
    chromium.js("Plotly.Fx.hover(document.getElementById('f'), [{curveNumber: 0, pointNumber: 0}])")
    chromium.js("return new Promise((done) => setTimeout(done, 300))")
    assert chromium.driver.title == "calm"
    assert chromium.js("return document.querySelectorAll('img').length") == 0
    assert chromium.problems() == [] and chromium.requests() == []
    assert chromium.data("f")[0]["x"] == [HOSTILE]


def test_the_policy_stops_what_a_page_would_fetch(chromium: Browser, run: RunData):
    """The test of requests could see one: this one is asked for, and blocked."""
    chromium.open(run.workdir / "report.html")
    chromium.js("new Image().src = 'http://localhost:9/x.png'")
    chromium.js("return new Promise((done) => setTimeout(done, 300))")
    (said,) = chromium.problems()
    assert "Content Security Policy" in said


def test_printing_gives_all_pages_light_with_figures_of_the_papers_width(
    chromium: Browser, run: RunData
):
    chromium.open(run.workdir / "report.html")
    chromium.js("document.getElementById('theme').click()")
    chromium.settle()
    pdf = chromium.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and pages >= len(chromium.menu)
    chromium.js("dispatchEvent(new Event('beforeprint'))")
    width = chromium.js("return document.getElementById('loss').querySelector('svg').clientWidth")
    assert width == 690
    assert chromium.js("return document.documentElement.dataset.theme") == "light"
    drawn = chromium.js(
        "return [...document.querySelectorAll('figure.plot')]"
        ".filter((f) => !f.closest('[hidden]')).every((f) => f.dataset.drawn === 'light printed')"
    )
    assert drawn
    chromium.js("dispatchEvent(new Event('afterprint'))")
    chromium.settle()
    assert chromium.js("return document.documentElement.dataset.theme") == "dark"
    chromium.js("localStorage.clear()")
    assert chromium.problems() == []


def test_a_narrow_window_has_no_sideways_scrolling(chromium: Browser, run: RunData):
    chromium.driver.set_window_size(500, 800)
    try:
        chromium.open(run.workdir / "report.html")
        for page in chromium.menu:
            chromium.show(page)
            width = (
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert chromium.js(width) <= 0, page
    finally:
        chromium.driver.set_window_size(1366, 900)
