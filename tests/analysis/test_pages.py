"""The pages of a run show the numbers of its files."""

import json
from pathlib import Path

import numpy as np
import pytest

from moejax.analysis import report
from moejax.analysis.page import Page, Text, Warning
from moejax.analysis.pages import cost, curves, drops, load, overview
from moejax.analysis.run import RunData
from moejax.analysis.statistics import balance
from tests.analysis import blocks, workdirs
from tests.analysis.workdirs import EXPERTS, LAYERS, LENGTH, PAIRS


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    return RunData.read(workdirs.write(tmp_path / "run"))


def lines(page: Page, name: str) -> dict[str, tuple[list, list]]:
    """The lines of a figure by name, as x and y."""
    traces = blocks.figures(page)[name].spec["data"]
    return {trace["name"]: (trace["x"], trace["y"]) for trace in traces}


def column(rows: list[dict], key: str) -> tuple[list, list]:
    return [row["step"] for row in rows], [row[key] for row in rows]


# Overview.


def test_the_verdict_has_the_last_held_out_loss_beside_the_baselines(run: RunData):
    loss = run.held_out[-1]["loss"]
    said = overview.verdict(run)
    assert f"{loss:.4f} nats/byte (4.0000 bits/byte) at step 30" in said
    assert f"{3.0 - loss:.4f} below the unigram model's 3.0000" in said


def test_the_cost_is_counted_as_in_sweeps(run: RunData):
    kept = [LAYERS * 2 * (1 - row["moe/drop_rate"]) for row in run.train]
    expected = 3000 + 300 * np.mean(kept)
    assert overview.flops_per_token(run, "train", "train") == pytest.approx(expected, rel=1e-12)
    assert overview.flops_per_token(run, "eval", "eval") == 1000 + 100 * LAYERS * 2
    cells = blocks.facts(overview.page(run), "cost")
    assert cells["parameters"] == "9.55k, 8.02k active per token"
    assert cells["memory expected per device"] == "3.0 MiB, 1.0 MiB of it state and gradients"
    assert cells["step"] == "500.0 ms (median)" and cells["all steps"].startswith("0m15s")


def test_config_fields_that_differ_are_listed_and_the_gates_own_compared_with_the_gates(
    tmp_path: Path,
):
    from moejax.config import default, set_gate, to_dict

    config = default()
    set_gate(config, "dselect_k")
    config.moe.gate.gamma = 0.5
    about = workdirs.saved(to_dict(config))
    run = RunData.read(workdirs.write(tmp_path / "run", about=about))
    rows = {row[0]: row[1:] for row in blocks.table(overview.page(run), "field").rows}
    fresh = default()
    set_gate(fresh, "dselect_k")
    assert rows.pop("moe.gate.gamma") == ("0.5", repr(fresh.moe.gate.gamma))
    assert rows.pop("moe.gate.name") == ("'dselect_k'", "'top_k'")
    preset = {name for name in rows if name.startswith("moe.")}
    assert not {name for name in rows if name.startswith("moe.gate")} and set(rows) == preset


def test_a_user_gate_is_shown_too(tmp_path: Path):
    config = workdirs.config()
    config["moe"]["gate"] = {"name": "their.module:Gate", "theirs": 3}
    run = RunData.read(workdirs.write(tmp_path / "run", about=workdirs.saved(config)))
    rows = {row[0]: row[1:] for row in blocks.table(overview.page(run), "field").rows}
    assert rows["moe.gate.theirs"] == ("3", "no such field")
    assert "cannot be derived" in blocks.said(cost.page(run))


# Curves.


def test_curves_are_the_rows(run: RunData):
    page = curves.page(run)
    found = lines(page, "loss")
    assert found["training"] == column(run.train, "loss")
    assert found["held out"] == column(run.held_out, "loss")
    assert found["bigram model 2.500"] == ([0, 30], [2.5, 2.5])
    assert lines(page, "curve-aux/z")["held out"] == column(run.held_out, "aux/z")
    assert list(lines(page, "curve-grad_norm")) == ["training"]
    assert blocks.options(page, "also recorded") == [
        "gradient norm", "learning rate", "accuracy", "load_balance", "z",
    ]  # fmt: skip


# Load.


def test_curves_of_a_run_that_leaks_say_so(run: RunData, tmp_path: Path):
    assert not [block for block in curves.page(run).blocks if isinstance(block, Warning)]
    rows = [workdirs.row(30, split, leak="train:future") for split in ("train", "eval")]
    leaks = RunData.read(workdirs.write(tmp_path / "leaks", rows))
    first = curves.page(leaks).blocks[0]
    assert isinstance(first, Warning) and first.text.startswith("Leaks (train:future): a token's")


def test_heatmaps_hold_load_over_mean_load(run: RunData):
    page = load.page(run)
    last = np.asarray(run.train[-1]["moe/load"])
    trace = blocks.figures(page)["load-training"].spec["data"][0]
    assert np.allclose(trace["customdata"], last / (PAIRS / EXPERTS), rtol=1e-12)
    assert np.allclose(trace["z"], np.log2(last / (PAIRS / EXPERTS)), rtol=1e-12)
    over_time = blocks.figures(page)["load-layer-1"].spec["data"][0]
    expected = [np.asarray(row["moe/load"])[1] / (PAIRS / EXPERTS) for row in run.train]
    assert over_time["x"] == [10, 20, 30]
    assert np.allclose(over_time["customdata"], np.transpose(expected), rtol=1e-12)


def test_the_slider_has_every_step_and_ends_at_the_last(run: RunData):
    figure = blocks.figures(load.page(run))["load-training"]
    (slider,) = figure.spec["layout"]["sliders"]
    assert [step["label"] for step in slider["steps"]] == ["10", "20", "30"]
    assert slider["active"] == 2
    for row, step in zip(run.train, slider["steps"], strict=True):
        shown = np.asarray(step["args"][0]["customdata"][0])
        assert np.allclose(shown, np.asarray(row["moe/load"]) / (PAIRS / EXPERTS), rtol=1e-12)


def test_an_expert_without_tokens_is_a_gap(tmp_path: Path):
    rows = [workdirs.row(30) | {"moe/load": [[0, 1, 1, 2], [1, 1, 1, 1]]}]
    run = RunData.read(workdirs.write(tmp_path / "run", rows))
    trace = blocks.figures(load.page(run))["load-training"].spec["data"][0]
    assert np.isnan(trace["z"][0][0]) and trace["z"][0][1:] == [0, 0, 1]


def test_measures_of_balance_are_computed_for_each_row(run: RunData):
    page = load.page(run)
    loads = [np.asarray(row["moe/load"], float) for row in run.train]
    for name, measure in (
        ("balance-maxvio", lambda n: n.max() / n.mean() - 1),
        ("balance-cv", lambda n: n.std() / n.mean()),
        ("balance-gini", lambda n: np.abs(n[:, None] - n).sum() / (2 * EXPERTS * n.sum())),
        ("balance-entropy", lambda n: -(n / n.sum() * np.log(n / n.sum())).sum() / np.log(EXPERTS)),
    ):
        figure = next(f for n, f in blocks.figures(page).items() if n.lower() == name)
        trace = figure.spec["data"][1]
        assert trace["name"] == "training, layer 1"
        assert np.allclose(trace["y"], [measure(n[1]) for n in loads], rtol=1e-12)


def test_the_table_is_of_the_last_quarter_of_training_and_the_last_evaluation(run: RunData):
    rows = blocks.table(load.page(run), "rows").rows
    assert [row[:2] for row in rows] == [
        (name, str(layer)) for name in ("training", "held out") for layer in range(LAYERS)
    ]
    held_out = np.asarray(run.held_out[-1]["moe/load"])
    assert rows[-1][2] == f"{balance.max_violation(held_out[-1]):.3f}"


def test_many_layers_are_drawn_as_mean_and_extremes():
    values_NM = np.arange(30.0).reshape(3, 10)
    found = load.by_layer("training", np.arange(3), values_NM)
    assert [trace["name"] for trace in found] == [
        "training, mean of layers", "training, lowest", "training, highest",
    ]  # fmt: skip
    assert found[0]["y"] == [4.5, 14.5, 24.5] and found[2]["y"] == [9, 19, 29]


def test_very_many_steps_are_averaged_into_points():
    values_NM = np.arange(1200.0)[:, None]
    (trace,) = load.by_layer("", np.arange(1, 1201), values_NM)
    assert trace["x"] == list(range(6, 1201, 6)) and trace["y"][:2] == [2.5, 8.5]
    (trace,) = load.by_layer("", np.arange(1000), values_NM[:1000])
    assert trace["y"] == values_NM[:1000, 0].tolist()


def test_many_logged_steps_are_averaged_into_columns_of_a_heatmap(tmp_path: Path):
    rows = [workdirs.row(step) for step in range(1, 501)]
    run = RunData.read(workdirs.write(tmp_path / "run", rows))
    figures = blocks.figures(load.page(run))
    assert len(figures["load-layer-0"].spec["data"][0]["x"]) == 200
    assert len(figures["load-training"].spec["layout"]["sliders"][0]["steps"]) == 40
    loads = np.asarray([row["moe/load"] for row in rows[:13]], float)[:, :, :].sum(axis=0)
    first = figures["load-training"].spec["layout"]["sliders"][0]["steps"][0]
    assert first["label"] == "13"  # 500 steps in 40 groups: the first ones have 13
    shown = np.asarray(first["args"][0]["customdata"][0])
    assert np.allclose(shown, loads / loads.mean(axis=1, keepdims=True), rtol=1e-12)


# Drops.


def test_drops_are_counted_by_layer_expert_choice_and_position(run: RunData):
    page = drops.page(run)
    last = run.train[-1]
    dropped, asked = np.asarray(last["moe/dropped"]), np.asarray(last["moe/load"])
    assert lines(page, "drop-rate")["pairs, training"] == column(run.train, "moe/drop_rate")
    by_layer = lines(page, "drops-layer-train")["layer 1"][1]
    assert by_layer[-1] == dropped[1].sum() / PAIRS
    by_expert = blocks.figures(page)["drops-expert-train"].spec["data"][0]["z"]
    assert np.allclose(by_expert, dropped / asked, rtol=1e-12)
    by_choice = lines(page, "drops-choice-train")["layer 0"][1]
    assert by_choice == [n / (PAIRS / 2) for n in last["moe/dropped_by_choice"][0]]
    by_position = lines(page, "drops-position-train")["layer 0"][1]
    assert by_position == [n / (PAIRS / LENGTH) for n in last["moe/dropped_by_position"][0]]


@pytest.mark.filterwarnings("error")
def test_rows_without_a_pair_have_no_share_dropped(tmp_path: Path):
    """As of a gate that has sent nothing in the last quarter of the rows."""
    zeros = {
        "moe/load": np.zeros((LAYERS, EXPERTS), int).tolist(), "moe/experts_per_token": 0.0,
        "moe/dropped": np.zeros((LAYERS, EXPERTS), int).tolist(),
        "moe/dropped_by_choice": np.zeros((LAYERS, 2), int).tolist(),
        "moe/dropped_by_position": np.zeros((LAYERS, LENGTH), int).tolist(),
    }  # fmt: skip
    rows = [workdirs.row(10), workdirs.row(20) | zeros, workdirs.row(30) | zeros]
    page = drops.page(RunData.read(workdirs.write(tmp_path / "none", rows)))
    for name in ("choice", "position"):
        assert not np.any(lines(page, f"drops-{name}-train")["layer 0"][1])


def test_a_split_without_drops_is_reported_as_such(run: RunData):
    page = drops.page(run)
    assert "No pair was dropped, held out (transport dropless)." in blocks.said(page)
    assert not [name for name in blocks.figures(page) if name.endswith("-eval")]


# Cost.


def test_times_equal_the_recorded_timings(run: RunData):
    page = cost.page(run)
    assert lines(page, "time-seconds_per_step")["step time"] == ([10, 20, 30], [500.0] * 3)
    assert "moejax profile" in blocks.said(page)


def test_a_profile_in_the_workdir_is_shown_and_a_damaged_one_is_not(run: RunData):
    rows = [{"part": "experts", "ms": 7.5, "share": 0.75, "mixed": 0.0}]
    (run.workdir / "profile").mkdir()
    path = run.workdir / "profile/profile.json"
    path.write_text(json.dumps({"steps": 5, "devices": 1, "device": "cpu", "rows": rows}))
    trace = blocks.figures(cost.page(run))["step-split"].spec["data"][0]
    assert (trace["y"], trace["x"], trace["customdata"]) == (["experts"], [7.5], [0.75])
    path.write_text('{"rows": [{}]}')
    assert "step-split" not in blocks.figures(cost.page(run))


def test_padding_is_slots_over_kept_pairs(run: RunData):
    slots = workdirs.ROWS * EXPERTS * 5  # ceil(8 tokens * 2 / 4 experts * 1.25) a sequence
    kept = [PAIRS - np.sum(row["moe/dropped"]) / LAYERS for row in run.train]
    found = lines(cost.page(run), "padding")["rows computed / pairs kept"][1]
    assert np.allclose(found, slots / np.asarray(kept), rtol=1e-12)


# All of them, on less.


@pytest.mark.parametrize("steps", [(), (10,)])
def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path, steps: tuple[int, ...]):
    run = RunData.read(workdirs.write(tmp_path / "run", [workdirs.row(step) for step in steps]))
    text = report.of_run(run)
    assert ("Nothing has been logged yet" in text) == (not steps) and "is not finished" in text


def test_a_dense_run_has_no_pages_of_experts(tmp_path: Path):
    rows = [
        {k: v for k, v in workdirs.row(30, split).items() if not k.startswith(("moe/", "aux/"))}
        for split in ("train", "eval")
    ]
    about = workdirs.saved(workdirs.config(moe__every=0))
    run = RunData.read(workdirs.write(tmp_path / "run", rows, about))
    shown = [page(run).title for page in report.PAGES if page(run).blocks]
    assert shown == ["Overview", "Curves", "Cost"]
    assert "none: dense feed-forward layers" in report.of_run(run)


def test_a_run_of_another_version_is_shown_as_far_as_it_goes(tmp_path: Path):
    rows = [{"step": 5, "split": "train", "loss": 2.0}, {"step": 5, "split": "eval", "loss": 2.0}]
    about = {"config": {"train": {"steps": 5}}, "version": "0.0.1"}
    run = RunData.read(workdirs.write(tmp_path / "run", rows, about))
    text = report.of_run(run)
    assert "Held-out loss 2.0000 nats/token at step 5" in text and "moejax 0.0.1 wrote it" in text


ROW = sorted({*workdirs.row(1), *workdirs.row(1, "eval")} - {"step", "split"})
SAVED = sorted(workdirs.saved().keys() - {"config"})
TIMING = sorted(workdirs.timing(1).keys() - {"step"})
FIELDS = ["mesh", "model", "moe", "moe.gate", "train", "optim", "data", "moe.num_experts"]


@pytest.mark.parametrize(
    ("file", "key"),
    [("row", k) for k in ROW] + [("saved", k) for k in SAVED] + [("timing", k) for k in TIMING]
    + [("config", k) for k in FIELDS],
)  # fmt: skip
def test_all_pages_are_made_if_an_older_run_lacks_any_one_value(
    tmp_path: Path, file: str, key: str
):
    workdir = workdirs.write(tmp_path / "run")
    about = workdirs.saved()
    if file == "config":
        section, _, field = key.rpartition(".")
        (about["config"][section] if section else about["config"]).pop(field)
    about.pop(key, None)
    (workdir / "config.json").write_text(json.dumps(about))
    for name in ("metrics.jsonl", "timings.jsonl"):
        rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
        workdirs.lines(workdir / name, [{k: v for k, v in r.items() if k != key} for r in rows])
    run = RunData.read(workdir)
    pages = [page(run) for page in report.PAGES]
    assert pages[0].blocks and pages[-1].blocks


def test_the_report_of_a_run_is_the_same_every_time(run: RunData):
    assert report.of_run(run) == report.of_run(RunData.read(run.workdir))


# A page from outside the package.


def test_one_line_adds_a_page_to_the_report(
    run: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def page(run: RunData) -> Page:
        return Page("Step count", [Text(f"The run has logged {run.last_step} steps.")])

    monkeypatch.setattr(report, "PAGES", (*report.PAGES, page))
    target = tmp_path / "report.html"
    report.write(run, target)
    text = target.read_text()
    assert '<a href="#step-count">Step count</a>' in text
    assert "The run has logged 30 steps." in text
