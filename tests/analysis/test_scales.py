"""The scales of pictures do not exaggerate: units, fixed colours, least spans, n of seeds."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.analysis import report
from moejax.analysis.page import Figure, Table
from moejax.analysis.pages import comparison, overview, stability, sweep_overview
from moejax.analysis.plot import figures as figures_of
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.sweep import figure as picture
from moejax.sweep.comparison import compare
from moejax.train import scales
from moejax.train.scales import span
from moejax.train.workdir.summary import summary_figure
from tests.analysis import blocks, probed, sweeps, workdirs
from tests.contrib.openmoe import test_page as openmoe

INDEX = re.compile(
    r"step|position|position in the sequence|expert( [ij])?|MoE layer|first choice in layer \d+|"
    r"column of the routing|variant|part of a step|domain|label|token id"
)
"""Quantities without a unit: ranks and names."""

UNIT = re.compile(
    r"nats(/\w+)?|nats squared|share( .*)?|ratio|number|0 to 1|-1 to 1|1 at balance|L2|per step|"
    r"ms per step|\w+ per second|directions|max load / mean load - 1|p first - second|"
    r"mean (per token|over tokens)|target units squared|FLOP per token, forward and backward"
)


def axes(figure: Figure) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Title and axis of each axis, and whether it is that of a heatmap's cells."""
    heat = {t["type"] == "heatmap" for t in figure.spec["data"]} == {True}
    for key, axis in figure.spec["layout"].items():
        if re.fullmatch(r"[xy]axis\d*", key):
            yield axis["title"]["text"].replace("<br>", " "), axis, heat


def check(name: str, figure: Figure) -> None:
    for title, axis, heat in axes(figure):
        if axis.get("type") == "category" or INDEX.fullmatch(title):
            assert title, f"{name}: an axis without a title"
            continue
        assert not heat, f"{name}: {title}"
        quantity, _, unit = title.partition(", ")
        assert quantity and UNIT.fullmatch(unit), f"{name}: {title!r} has no unit"
        low, high = axis["range"]
        assert math.isfinite(low) and math.isfinite(high) and low < high, f"{name}: {axis}"
        if unit.startswith("nats/"):
            assert high - low >= scales.NATS * 0.999, f"{name}: {axis}"
        if unit.startswith("share"):
            assert high - low >= scales.SHARE * 0.999, f"{name}: {axis}"
    for trace in figure.spec["data"]:
        if trace["type"] == "heatmap":
            bar = trace["colorbar"]["title"]["text"]
            assert UNIT.fullmatch(bar.rpartition(", ")[2]), f"{name}: {bar!r} has no unit"
            assert (trace["zmin"], trace["zmax"]) in ENDS, f"{name}: colours follow the data"
    assert figure.caption, name


ENDS = {(0.0, 1.0), (-1.0, 1.0), (-3, 3), (-scales.LOAD_OCTAVES, scales.LOAD_OCTAVES)}
"""Ends of every colour scale: shares, cosines, lifts, loads over the mean."""


def still(arrays: dict[str, Any]) -> dict[str, Any]:
    """A probe in which nothing differs: the hardest case for a scale that follows its data."""
    same = {"entropy": 0.5, "margin": 0.1, "log_z": 0.0, "max_logit": 0.0, "collapse": 1.0}
    return arrays | {name: np.full_like(arrays[name], value) for name, value in same.items()}


@pytest.mark.parametrize("change", [dict, still], ids=["random", "constant"])
def test_every_figure_of_a_run_has_units_and_a_scale(tmp_path: Path, change: Any):
    run = probed.run_of(tmp_path / "run", change=change)
    (run.workdir / "profile").mkdir()
    rows = [{"part": "experts", "ms": 7.5, "share": 0.75, "mixed": 0.0}]
    (run.workdir / "profile/profile.json").write_text(json.dumps({"steps": 5, "rows": rows}))
    found = figures_of(run)
    assert len(found) > 35 and {"overview-loss", "step-split", "padding", "churn"} <= found.keys()
    for name, figure in found.items():
        check(name, figure)


def test_every_figure_of_a_run_with_constant_numbers_has_units_and_a_scale(tmp_path: Path):
    zeros: dict[str, Any] = {
        "loss": 2.0, "grad_norm": 0.0, "learning_rate": 0.0, "accuracy": 0.0, "mse/a": 0.0,
        "auc/a": 1.0, "log_loss/a": 0.1, "moe/gate/own": 0.0, "moe/max_vio": 0.0,
        "moe/drop_rate": 0.0,
    }  # fmt: skip
    rows = [workdirs.row(s, side) | zeros for s in (10, 20) for side in ("train", "eval")]
    about = workdirs.saved(baselines={})
    for name, figure in figures_of(
        RunData.read(workdirs.write(tmp_path / "run", rows, about))
    ).items():
        check(name, figure)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_figure_of_a_sweep_has_units_and_a_scale(tmp_path: Path, seeds: tuple[int, ...]):
    difference = {"seeds": [0], "mean": 0.004, "half_width": None, "p": None, "p_holm": None}
    found = sweeps.summary(
        sweeps.outcome("switch", 2.0, difference=difference), sweeps.outcome("top_2", 2.004)
    )
    folder = sweeps.write(tmp_path / "sweep", seeds=seeds, summary=found)
    for summary in (True, False):
        if not summary:
            (folder / "summary.json").unlink()
        drawn = figures_of(SweepData.read(folder))
        assert {"overview-losses", "loss-against-cost", "load-side-by-side"} <= drawn.keys()
        for name, figure in drawn.items():
            check(name, figure)
            if name.startswith(("overview-losses", "loss-against", "curves-")):
                assert re.search(r"n = \d|\d seeds|one seed", figure.caption), figure.caption
            if name.startswith("curves-held-out"):
                low, high = figure.spec["layout"]["yaxis"]["range"]
                lines = [t["y"] for t in figure.spec["data"] if "fill" not in t]
                assert all(low <= min(y) and max(y) <= high for y in lines), "a seed is cut off"


def test_every_figure_of_openmoes_page_has_units_and_a_scale():
    page = openmoe.page(openmoe.measured(), [])
    assert blocks.figures(page)
    for name, figure in blocks.figures(page).items():
        check(name, figure)


# What was shown wrongly.


def test_two_seeds_that_are_close_look_close(tmp_path: Path):
    """0.004 nats apart: less than a tenth of the axis."""
    near = [sweeps.outcome("switch", 2.0), sweeps.outcome("top_2", 2.004)]
    for outcome in near:
        outcome |= {"seeds": [0], "half_width": None}
        outcome["trials"] = [outcome["trials"][0] | {"loss": outcome["mean"]}]
    sweep = SweepData.read(sweeps.write(tmp_path / "s", (0,), summary=sweeps.summary(*near)))
    for figure, side in (
        (blocks.figures(comparison.page(sweep))["loss-against-cost"], "yaxis"),
        (blocks.figures(sweep_overview.page(sweep))["overview-losses"], "xaxis"),
    ):
        low, high = figure.spec["layout"][side]["range"]
        assert 0.004 / (high - low) < 0.1


def test_a_router_similarity_of_0_2_is_pale(tmp_path: Path):
    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        experts = arrays["router_similarity"].shape[-1]
        matrix = np.full((experts, experts), 0.2) + 0.8 * np.eye(experts)
        return arrays | {"router_similarity": np.stack([matrix] * 2)}

    page = stability.page(probed.run_of(tmp_path / "run", change=change))
    cells = probed.spec(page, "router-similarity-0")["data"][0]
    assert (cells["zmin"], cells["zmax"]) == (-1, 1) and np.nanmax(cells["z"]) < 0.21


def test_drops_in_training_come_before_those_of_the_evaluation_and_both_are_named(tmp_path: Path):
    rows = [workdirs.row(30) | {"moe/drop_rate": 0.17}, workdirs.row(30, "eval")]
    run = RunData.read(workdirs.write(tmp_path / "run", rows))
    facts = blocks.facts(overview.page(run), "outcome")
    names = list(facts)
    assert facts["pairs dropped, training"].startswith("17.00%, mean of the last quarter")
    assert facts["pairs dropped, evaluation"] == "0.00%, last evaluation (transport dropless)"
    assert names.index("pairs dropped, training") < names.index("pairs dropped, evaluation")
    said = overview.verdict(run)
    assert said.index("In training 17.00% of pairs") < said.index("0.00% of pairs")


def test_the_overview_begins_with_picture_and_table(tmp_path: Path):
    about = workdirs.saved(command="moejax train --config=x", commit="ab" * 20)
    run = RunData.read(workdirs.write(tmp_path / "run", about=about))
    first, second, *_ = overview.page(run).blocks
    assert isinstance(first, Figure) and second == blocks.table(overview.page(run), "outcome")
    facts = blocks.facts(overview.page(run), "outcome")
    assert facts["command"] == "moejax train --config=x" and facts["commit"] == "ab" * 20
    assert facts["seed"] == "0" and facts["held-out loss"].endswith("nats/byte at step 30")
    sweep = SweepData.read(sweeps.write(tmp_path / "sweep"))
    first, second, *_ = sweep_overview.page(sweep).blocks
    assert isinstance(first, Figure) and isinstance(second, Table)
    assert second.header[0] == "variant"
    assert "command" in blocks.facts(sweep_overview.page(sweep), "made by")
    row = dict(zip(second.header, second.rows[0], strict=True))
    assert row["n"] == "2" and row["dropped, evaluation"] == "0.00 %"


# One unit.


def with_tokenizer(folder: Path) -> None:
    """Tokens of 2.5 bytes: held-out losses per byte are those of each row."""
    path = folder / "config.json"
    seen = {"rows": 4, "tokens": 100, "bytes": 250}
    saved = json.loads(path.read_text()) | {"evaluated": seen}
    path.write_text(json.dumps(saved))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "eval":
            row["bits_per_byte"] = row["loss"] / math.log(2) / 2.5
    workdirs.lines(folder / "metrics.jsonl", rows)


def test_a_report_has_one_unit_of_loss(tmp_path: Path):
    """Per token in a run's, unless tokens are bytes; per byte in a sweep's, whatever tokens are."""
    workdir = workdirs.write(tmp_path / "run")
    assert "nats/token" not in report.of_run(RunData.read(workdir))
    with_tokenizer(workdir)
    text = report.of_run(RunData.read(workdir))
    assert "nats/token" in text and "nats/byte" not in text
    folder = sweeps.write(tmp_path / "sweep")
    for trial in (folder / "trials").iterdir():
        with_tokenizer(trial)
    sweep = SweepData.read(folder)
    assert "nats/token" not in report.of_sweep(sweep)
    drawn = figures_of(sweep)
    held = next(t for t in drawn["curves-held-out loss"].spec["data"] if "fill" not in t)
    lines = (folder / "trials/switch-seed0/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    own = [row["loss"] / 2.5 for row in rows if row["split"] == "eval"]
    assert held["y"] == pytest.approx(own, rel=1e-12)
    result = next(r for r in sweep.results if (r.variant, r.seed) == ("switch", 0))
    assert held["y"][-1] == pytest.approx(result.loss, rel=1e-12)
    assert "divided by the bytes per token" in drawn["curves-training loss"].caption


# The pictures of matplotlib.


def test_the_axes_of_a_runs_summary_span_its_values(tmp_path: Path):
    flat = {"loss": 2.0, "moe/drop_rate": 0.0, "moe/max_vio": 0.0}
    rows = [workdirs.row(s, side) | flat for s in (10, 20) for side in ("train", "eval")]
    about = workdirs.saved(baselines={})
    workdir = workdirs.write(tmp_path / "run", rows, about)
    found = {}
    for axes in summary_figure(str(workdir)).findobj(lambda a: hasattr(a, "get_ylim")):
        found.setdefault(axes.get_title(), np.ptp(axes.get_ylim()))
    assert found["Loss"] >= 0.0499 and found["Dropped pairs"] >= 0.0499
    assert found["Imbalance"] >= 0.499


def test_the_axes_of_a_sweeps_picture_span_its_values(tmp_path: Path):
    sweep = SweepData.read(sweeps.write(tmp_path / "sweep", (0,)))
    results = sweep.results
    from moejax.sweep.definition import Sweep
    from moejax.sweep.match import Comparison

    trials = tuple(trial.trial for trial in sweep.trials)
    summary = compare(Sweep("s", trials, Comparison(None, "top_2")), results, set())
    drawn = picture.figure("title", results, summary)
    left, _, forest = drawn.axes
    assert np.ptp(left.get_ylim()) >= 0.0499 and np.ptp(forest.get_xlim()) >= 0.0499
    assert "nats/byte" in left.get_ylabel() and "nats/byte" in forest.get_xlabel()
    assert any("n = 1 per variant" in text.get_text() for text in drawn.texts)


@pytest.mark.parametrize(
    ("values", "least", "ends", "wanted"),
    [
        ([2.0, 2.0], 0.05, {}, (1.975, 2.025)),
        ([1.0, 2.0], 0.05, {}, (0.94, 2.06)),
        ([0.0, 0.0], 0.05, {"start": 0.0}, (0.0, 0.05)),
        ([0.5, 1.0], 0.05, {"start": 0.0}, (0.0, 1.06)),
        ([1.0, 1.0], 0.05, {"bounds": (0.0, 1.0)}, (0.95, 1.0)),
        ([0.0, 1.0], 0.05, {"bounds": (0.0, 1.0)}, (0.0, 1.0)),
        ([math.nan, math.inf], 1.0, {}, (-0.5, 0.5)),
    ],
)
def test_an_axis_shows_its_values_and_keeps_its_least_span(
    values: list[float], least: float, ends: dict[str, Any], wanted: tuple[float, float]
):
    assert span(values, least, **ends) == pytest.approx(wanted)
