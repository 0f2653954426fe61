"""The pages of a sweep show the numbers of its folder."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moejax.analysis import report
from moejax.analysis.page import Text, Warning
from moejax.analysis.pages import comparison, sweep_curves, sweep_load, sweep_overview
from moejax.analysis.sweep import SweepData
from moejax.errors import UserError
from tests.analysis import blocks, sweeps, workdirs

LEAK = "train:future eval:future"
DIFFERENCE = {"seeds": [0, 1], "mean": -0.021, "half_width": 0.008, "p": 0.012, "p_holm": 0.024}
VERDICT = "better by 0.021 ± 0.008 nats/byte"


def read(folder: Path) -> SweepData:
    return SweepData.read(folder)


def compared(tmp_path: Path, **changes: object) -> SweepData:
    first = {"difference": DIFFERENCE, "verdict": VERDICT} | changes
    switch = sweeps.outcome("switch", 2.0) | first
    found = sweeps.summary(switch, sweeps.outcome("top_2", 2.021))
    return read(sweeps.write(tmp_path / "sweep", summary=found))


def test_a_sweep_is_read_as_its_trials(tmp_path: Path):
    sweep = read(sweeps.write(tmp_path / "sweep"))
    assert sweep.variants == ["switch", "top_2"] and len(sweep.trials) == 4
    assert all(trial.finished and trial.state == "finished" for trial in sweep.trials)
    assert [run.name for run in sweep.runs("top_2")] == ["top_2-seed0", "top_2-seed1"]
    losses = [trial.run.held_out[-1]["loss"] for trial in sweep.trials if trial.run]
    assert [result.loss for result in sweep.results] == losses


# Without summary.json: what the trials say.


def test_means_have_students_interval(tmp_path: Path):
    sweep = read(sweeps.write(tmp_path / "sweep", seeds=(0, 1, 2)))
    page = comparison.page(sweep)
    row = dict(zip(*[(t := blocks.table(page, "variant")).header, t.rows[0]], strict=True))
    losses = [run.held_out[-1]["loss"] for run in sweep.runs("switch")]
    half = stats.t.ppf(0.975, 2) * np.std(losses, ddof=1) / math.sqrt(3)
    assert row["loss, nats/byte"] == f"{np.mean(losses):.4f} ± {half:.4f}"
    assert row["seeds"] == "3/3" and "difference" not in row and "leak" not in row
    assert "no summary.json" in blocks.said(sweep_overview.page(sweep))


def test_the_scatter_holds_every_seed_and_the_mean(tmp_path: Path):
    sweep = read(sweeps.write(tmp_path / "sweep"))
    seeds, mean = blocks.figures(comparison.page(sweep))["loss-against-cost"].spec["data"][:2]
    own = [result for result in sweep.results if result.variant == "switch"]
    assert seeds["y"] == [result.loss for result in own]
    assert seeds["x"] == [result.train_flops_per_token for result in own]
    assert mean["y"] == [pytest.approx(np.mean(seeds["y"]), rel=1e-14)]


# With it.


def test_the_verdicts_of_the_sweep_are_repeated(tmp_path: Path):
    sweep = compared(tmp_path)
    said = blocks.said(sweep_overview.page(sweep))
    assert "lowest held-out loss has switch, 2.0000 ± 0.1270 nats/byte." in said
    assert f"Against the baseline top_2: switch: {VERDICT}." in said
    facts = blocks.facts(sweep_overview.page(sweep), "what ran")
    assert facts["matched"] == "active_flops, within 2% of the baseline"
    assert "0.0310 nats/byte, with probability 80%" in facts["can be detected"]
    table = blocks.table(comparison.page(sweep), "variant")
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["difference"] == "-0.0210 ± 0.0080" and row["p (Holm)"] == "0.024"
    assert row["active_flops"] == "2.00M (1.00 x)" and row["verdict"] == VERDICT


def test_differences_are_drawn_with_their_intervals(tmp_path: Path):
    (trace,) = blocks.figures(comparison.page(compared(tmp_path)))["differences"].spec["data"]
    assert (trace["x"], trace["y"], trace["error_x"]["array"]) == ([-0.021], ["switch"], [0.008])


def test_intervals_beyond_the_axis_are_named_and_others_are_not(tmp_path: Path):
    narrow = sweeps.outcome("switch", 2.0, half_width=0.01)
    for number, (half, said) in enumerate([(0.02, "mean; small"), (9.0, "axis: top_2); small")]):
        found = sweeps.summary(narrow, sweeps.outcome("top_2", 2.021, half_width=half))
        sweep = read(sweeps.write(tmp_path / str(number), summary=found))
        figure = blocks.figures(comparison.page(sweep))["loss-against-cost"]
        assert said in figure.caption
        low, high = figure.spec["layout"]["yaxis"]["range"]
        assert (low <= 2.021 - half and 2.021 + half <= high) == (number == 0)


def test_leaks_and_missed_matches_are_marked_in_table_and_figure(tmp_path: Path):
    sweep = compared(tmp_path, leak=LEAK, missed_match=True)
    page = comparison.page(sweep)
    table = blocks.table(page, "variant")
    assert table.rows[0][0] == "switch †‡" and table.rows[0][-1] == LEAK
    assert "†: " in table.caption and "‡: " in table.caption
    seeds, switch, _, top_2 = blocks.figures(page)["loss-against-cost"].spec["data"]
    assert seeds["name"] == "switch †‡"  # which a hover shows
    assert switch["name"] == "switch †‡" and switch["marker"]["symbol"] == "diamond-open"
    assert top_2["name"] == "top_2" and top_2["marker"]["symbol"] == "circle"
    said = blocks.said(sweep_overview.page(sweep))
    assert "it leaks" in said and "do not leak: top_2, 2.0210" in said


def test_no_sentence_names_a_marked_variant_without_its_mark(tmp_path: Path):
    changes = {"missed_match": True, "cost_ratio": 1.5}
    said = blocks.said(sweep_overview.page(compared(tmp_path, **changes)))
    assert "switch ‡, 2.0000 ± 0.1270 nats/byte (at 1.50 times the baseline's cost)." in said
    assert "Of those that do not miss the match: top_2, 2.0210" in said
    assert f"Against the baseline top_2: switch ‡: {VERDICT}. †: " in said
    found = sweeps.summary(
        sweeps.outcome("switch", 2.0, verdict=VERDICT), sweeps.outcome("top_2", 1.0, leak=LEAK)
    )
    said = blocks.said(sweep_overview.page(read(sweeps.write(tmp_path / "b", summary=found))))
    assert f"Against the baseline top_2 †: switch: {VERDICT}. †: " in said


def test_without_a_mark_no_mark_is_explained(tmp_path: Path):
    said = blocks.said(sweep_overview.page(compared(tmp_path)))
    assert "†" not in said and "Of those" not in said


def test_a_baseline_that_is_alone_has_no_verdict_against_it(tmp_path: Path):
    found = sweeps.summary(sweeps.outcome("switch", 2.0) | NONE, sweeps.outcome("top_2", 1.0))
    folder = sweeps.write(tmp_path / "sweep", summary=found)
    for seed in (0, 1):
        shutil.rmtree(folder / f"trials/switch-seed{seed}")
    page = sweep_overview.page(read(folder))
    assert "Against" not in blocks.said(page)
    verdict = next(block for block in page.blocks if isinstance(block, Text))
    assert verdict.text.endswith("0.1270 nats/byte.")


def test_the_best_variant_is_reported_with_its_diverged_seeds(tmp_path: Path):
    switch = sweeps.outcome("switch", 2.0, seeds=[0], diverged=[1])
    found = sweeps.summary(switch, sweeps.outcome("top_2", 3.0))
    folder = sweeps.write(tmp_path / "sweep", summary=found)
    diverge(folder, "switch-seed1")
    assert "nats/byte (1 of 2 seeds diverged)." in blocks.said(sweep_overview.page(read(folder)))


NONE = {
    "mean": None, "half_width": None, "cost": None, "cost_ratio": None, "seeds": [], "trials": [],
    "difference": None, "verdict": "no finished seed: no verdict",
}  # fmt: skip


def diverge(folder: Path, trial: str) -> None:
    """Makes a trial one that diverged at once."""
    workdir = folder / "trials" / trial
    workdirs.lines(workdir / "metrics.jsonl", [workdirs.row(10)])
    (workdir / "log.txt").write_text("# moejax train\nmoejax: diverged at step 17: lower it\n")


def test_diverged_trials_and_variants_without_numbers_are_in_the_table(tmp_path: Path):
    switch = sweeps.outcome("switch", 2.0) | NONE | {"diverged": [0, 1]}
    found = sweeps.summary(switch, sweeps.outcome("top_2", 2.021))
    folder = sweeps.write(tmp_path / "sweep", summary=found)
    for seed in (0, 1):
        diverge(folder, f"switch-seed{seed}")
    sweep = read(folder)
    row = blocks.table(comparison.page(sweep), "variant").rows[0]
    assert row[1] == "0/2 diverged" and row[2] == "-"
    assert not sweep.stale and report.of_sweep(sweep)


def test_trials_that_finished_after_summary_json_was_written_are_compared(tmp_path: Path):
    """As after a pilot of the baseline alone."""
    found = sweeps.summary(sweeps.outcome("switch", 2.0) | NONE, sweeps.outcome("top_2", 1.0))
    sweep = read(sweeps.write(tmp_path / "sweep", seeds=(0, 1), summary=found))
    own, other = ([r.loss for r in sweep.results if r.variant == v] for v in ("switch", "top_2"))
    table = blocks.table(comparison.page(sweep), "variant")
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    mean, half = np.mean(own) - np.mean(other), stats.ttest_rel(own, other).confidence_interval()
    assert rows[0]["seeds"] == "2/2" and rows[0]["difference"] == (
        f"{mean:.4f} ± {(half.high - half.low) / 2:.4f}"
    )
    assert rows[0]["loss, nats/byte"].startswith(f"{np.mean(own):.4f} ± ")
    best = min(("switch", own), ("top_2", other), key=lambda named: np.mean(named[1]))
    page = sweep_overview.page(sweep)
    said = blocks.said(page)
    assert f"lowest held-out loss has {best[0]}, {np.mean(best[1]):.4f}" in said
    assert "Against the baseline top_2: switch: " in said
    first = page.blocks[0]
    assert isinstance(first, Warning) and first == comparison.page(sweep).blocks[0]
    assert "summary.json is older than the runs: it has other trials of switch than" in first.text
    facts = blocks.facts(page, "what ran")
    assert facts["matched"] == "active_flops, within 2% of the baseline"
    assert "the deviation over seeds in this sweep" in facts["can be detected"]
    assert facts["can be detected"].endswith(
        "; 2 degrees of freedom: the true value may be 0.52 to 6.3 times that"
    )


@pytest.mark.parametrize("change", ["gone", "diverged", "more seeds"])
def test_other_changes_since_summary_json_are_reported(tmp_path: Path, change: str):
    folder = tmp_path / "sweep"
    found = sweeps.summary(sweeps.outcome("switch", 2.0), sweeps.outcome("top_2", 1.0))
    sweeps.write(folder, seeds=(0, 1, 2) if change == "more seeds" else (0, 1), summary=found)
    if change == "gone":
        shutil.rmtree(folder / "trials/top_2-seed1")
    if change == "diverged":
        diverge(folder, "top_2-seed1")
    sweep = read(folder)
    counts = [row[1] for row in blocks.table(comparison.page(sweep), "variant").rows]
    if change == "more seeds":
        assert "other trials of switch, top_2 than" in sweep.stale and counts == ["3/3", "3/3"]
    else:
        assert "other trials of top_2 than" in sweep.stale
        assert counts == ["2/2", "1/2" + " diverged" * (change == "diverged")]


def test_a_summary_that_has_every_trial_is_not_stale(tmp_path: Path):
    sweep = compared(tmp_path)
    assert not sweep.stale and "older than the runs" not in report.of_sweep(sweep)


def damaged(**changes: object) -> str:
    found = sweeps.summary(sweeps.outcome("switch", 2.0), sweeps.outcome("top_2", 1.0))
    return json.dumps(found | changes)


@pytest.mark.parametrize(
    "content",
    [
        "{", '{"format": 2}', "[]", '{"format": 1}', damaged(variants=3), damaged(variants=[3]),
        damaged(variants=[{"variant": "switch"}]), damaged(baseline="dense"), damaged(match="time"),
        damaged(cost={}), damaged(detectable={}),
        damaged(variants=[sweeps.outcome("switch", 2.0, seeds=None)]),
        damaged(variants=[sweeps.outcome("switch", 2.0, trials=[{}])]),
        damaged(variants=[sweeps.outcome("switch", 2.0, difference={"p": 0.1})]),
    ],
)  # fmt: skip
def test_an_unreadable_summary_is_reported_and_the_trials_are_shown(tmp_path: Path, content: str):
    folder = sweeps.write(tmp_path / "sweep")
    (folder / "summary.json").write_text(content)
    sweep = read(folder)
    assert "summary.json is" in sweep.problems[0] and report.of_sweep(sweep)
    assert len(blocks.table(comparison.page(sweep), "variant").rows) == 2


# Curves and load.


def test_curves_are_means_over_seeds_where_all_seeds_have_rows(tmp_path: Path):
    sweep = read(sweeps.write(tmp_path / "sweep", seeds=(0, 1, 2)))
    figure = blocks.figures(sweep_curves.page(sweep))["curves-held-out loss"]
    table = np.asarray([[r["loss"] for r in run.held_out] for run in sweep.runs("switch")])
    mean = next(t for t in figure.spec["data"] if t["name"] == "switch" and "fill" not in t)
    assert mean["x"] == [20, 30] and np.allclose(mean["y"], table.mean(axis=0), rtol=1e-14)
    band = next(t for t in figure.spec["data"] if t.get("fill"))
    half = stats.t.ppf(0.975, 2) * table.std(axis=0, ddof=1) / math.sqrt(3)
    assert np.allclose(band["y"][:2], table.mean(axis=0) + half, rtol=1e-9)
    thin = [t for t in figure.spec["data"] if "seed" in t["name"]]
    assert [t["name"] for t in thin[:3]] == ["switch-seed0", "switch-seed1", "switch-seed2"]
    assert [t["y"] for t in thin[:3]] == table.tolist()


def test_the_means_of_many_variants_come_first_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep_curves, "CLEAR", 1)
    page = sweep_curves.page(read(sweeps.write(tmp_path / "sweep")))
    assert blocks.options(page, "shown") == ["means", "seeds and intervals"]
    figures = blocks.figures(page)
    names = [trace["name"] for trace in figures["curves-held-out loss"].spec["data"]]
    assert names == ["switch", "top_2"]
    assert len(figures["curves-held-out loss-seeds"].spec["data"]) == 2 + 4 + 2


def test_a_step_that_one_seed_lacks_is_left_out_of_the_mean():
    curves = [
        (np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0])),
        (np.array([1, 3]), np.array([3.0, 5.0])),
    ]
    steps, mean, _ = sweep_curves.mean_curve(curves)
    assert steps.tolist() == [1, 3] and mean.tolist() == [2, 4]


def test_load_is_offered_by_variant_and_side_by_side(tmp_path: Path):
    sweep = read(sweeps.write(tmp_path / "sweep"))
    page = sweep_load.page(sweep)
    assert blocks.options(page, "variant") == ["switch", "top_2"]
    figures = blocks.figures(page)
    assert {"switch-load-training", "top_2-load-training"} <= figures.keys()
    panels = figures["load-side-by-side"].spec["data"]
    for panel, variant in zip(panels, sweep.variants, strict=True):
        load = np.asarray(sweep.runs(variant)[0].held_out[-1]["moe/load"])
        expected = load / load.mean(axis=1, keepdims=True)
        assert panel["name"] == variant and np.allclose(panel["customdata"], expected, rtol=1e-12)
    row = blocks.table(page, "variant").rows[0]
    rates = [100 * run.train[-1]["moe/drop_rate"] for run in sweep.runs("switch")]
    assert row[7].startswith(f"{np.mean(rates):.2f} ± ") and row[8] == "0.00 %"


def test_curves_and_load_carry_the_marks_of_their_variants(tmp_path: Path):
    sweep = compared(tmp_path, leak=LEAK, missed_match=True, cost_ratio=1.5)
    drawn = blocks.figures(sweep_curves.page(sweep))["curves-held-out loss"]
    means = {t["name"] for t in drawn.spec["data"] if t["line"]["width"] == 2.2}
    thin = {t["name"] for t in drawn.spec["data"] if t["line"]["width"] == 0.8}
    assert means == {"switch †‡", "top_2"} and {"switch-seed1 †‡", "top_2-seed1"} <= thin
    page = sweep_load.page(sweep)
    table, figures = blocks.table(page, "variant"), blocks.figures(page)
    assert [row[0] for row in table.rows] == ["switch †‡", "top_2"]
    panels = figures["load-side-by-side"]
    assert [p["name"] for p in panels.spec["data"]] == ["switch †‡", "top_2"]
    assert [a["text"] for a in panels.spec["layout"]["annotations"]] == ["switch †‡", "top_2"]
    assert blocks.options(page, "variant") == ["switch †‡", "top_2"]
    assert "Trial switch-seed0 †‡. †: " in blocks.said(page)
    assert all("‡: the cost misses" in each.caption for each in (drawn, table, panels))
    assert "switch-load-training" in figures  # links stay what they are


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)])
def test_measures_that_do_not_exist_are_shown_as_such(tmp_path: Path, seeds: tuple[int, ...]):
    """One expert has no entropy to be relative to, and a layer without pairs has no shares."""
    folder = sweeps.write(tmp_path / "sweep", seeds=seeds)
    loads = {"switch": [[8], [8]], "top_2": [[0, 0], [4, 4]]}
    for variant, load in loads.items():
        zeros = [[0] * len(row) for row in load]
        changes: dict[str, Any] = {"moe__load": load, "moe__dropped": zeros}
        rows = [workdirs.row(s, side, **changes) for s in (10, 30) for side in ("train", "eval")]
        for seed in seeds:
            workdirs.lines(folder / f"trials/{variant}-seed{seed}/metrics.jsonl", rows)
    sweep = read(folder)
    rows = blocks.table(sweep_load.page(sweep), "variant").rows
    assert [row[2] for row in rows] == ["nan", "nan"]
    assert report.of_sweep(sweep)


# Sweeps that went wrong.


def test_a_sweep_of_failures_shows_the_ends_of_their_logs(tmp_path: Path):
    folder = sweeps.write(tmp_path / "sweep", finished=False)
    for trial in ("switch-seed0", "switch-seed1", "top_2-seed0"):
        (folder / "trials" / trial).mkdir(parents=True)
        said = "\n".join(f"line {n}" for n in range(40)) + "\n<MemoryError>"
        (folder / "trials" / trial / "log.txt").write_text(said)
    sweep = read(folder)
    page = sweep_overview.page(sweep)
    assert "0 of 4 trials" in blocks.said(page) and "nothing to compare" in report.of_sweep(sweep)
    states = blocks.facts(page, "state")
    assert states == {
        "no step logged": "switch-seed0, switch-seed1, top_2-seed0", "not started": "top_2-seed1",
    }  # fmt: skip
    logs = blocks.options(page, "end of the log of")
    assert logs == ["switch-seed0", "switch-seed1", "top_2-seed0"]
    text = blocks.said(page)
    assert "line 26\n" in text and "line 25\n" not in text  # the last fifteen lines
    assert "&lt;MemoryError&gt;" in report.of_sweep(sweep)


def test_an_unfinished_trial_shows_its_progress_and_is_not_compared(tmp_path: Path):
    folder = sweeps.write(tmp_path / "sweep")
    shutil.rmtree(folder / "trials/top_2-seed1")
    workdirs.write(folder / "trials/top_2-seed1", [workdirs.row(10)], workdirs.saved())
    sweep = read(folder)
    row = blocks.table(sweep_overview.page(sweep), "state").rows[0]
    assert row == ("stopped or running, step 10 of 30", "top_2-seed1")
    assert blocks.table(comparison.page(sweep), "variant").rows[1][1] == "1/2"


def test_a_trial_that_cannot_be_read_is_a_problem_of_the_sweep(tmp_path: Path):
    folder = sweeps.write(tmp_path / "sweep")
    (folder / "trials/switch-seed0/config.json").write_text("{")
    (folder / "trials/switch-seed1/timings.jsonl").unlink()
    sweep = read(folder)
    assert any("switch-seed0" in problem for problem in sweep.problems)
    assert report.of_sweep(sweep)


def test_warnings_of_trials_are_gathered_by_variant(tmp_path: Path):
    folder = sweeps.write(tmp_path / "sweep")
    for seed in (0, 1):
        rows = [workdirs.row(30, leak=LEAK), workdirs.row(30, "eval", leak=LEAK)]
        workdirs.lines(folder / f"trials/switch-seed{seed}/metrics.jsonl", rows)
    rows = blocks.table(sweep_overview.page(read(folder)), "warning").rows
    assert [row[:3] for row in rows if row[0] == "leak"] == [("leak", "switch", "0, 1")]
    rows = [workdirs.row(10), workdirs.row(30, "eval", loss=9.0)]
    for trial in ("switch-seed0", "switch-seed1", "top_2-seed0", "top_2-seed1"):
        workdirs.lines(folder / "trials" / trial / "metrics.jsonl", rows)
    rows = blocks.table(sweep_overview.page(read(folder)), "warning").rows
    assert [row[:3] for row in rows if row[0] == "above baselines"] == [
        ("above baselines", "all", "all")
    ]


@pytest.mark.parametrize(
    "content", [None, "{", '{"trials": 3}', '{"trials": []}', '{"trials": [{"name": "a"}]}']
)
def test_a_folder_without_a_sweep_is_refused_in_one_line(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match="sweep") as refused:
        SweepData.read(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_report_of_a_sweep_is_the_same_every_time(tmp_path: Path):
    folder = sweeps.write(tmp_path / "sweep")
    assert report.of_sweep(read(folder)) == report.of_sweep(read(folder))
    assert json.loads((folder / "sweep.json").read_text())["experiment"] in report.of_sweep(
        read(folder)
    )
