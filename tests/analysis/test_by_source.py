"""Losses of the sources of a mixture: on the pages of a run, of several, and of a sweep."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moejax.analysis.page import Table
from moejax.analysis.pages import curves, overview, several_runs, sweep_curves, sweep_overview
from moejax.analysis.run import RunData
from moejax.analysis.several import beside
from moejax.analysis.sweep import SweepData
from moejax.sweep import results, summary
from moejax.sweep.definition import Sweep
from moejax.sweep.folder import read_index
from tests.analysis import blocks, sweeps, workdirs

STEPS = (10, 20, 30)
TOKENS = {"web": 100, "code": 50}
BYTES = {"web": 400, "code": 100}
MIXTURE = {
    name: {"share": 0.5, "evaluated": {"rows": 1, "tokens": TOKENS[name], "bytes": BYTES[name]}}
    for name in TOKENS
}


def losses(step: int, seed: int, split: str) -> dict[str, Any]:
    web, code = 3 + 1 / step + 0.1 * seed, 2 + 1 / step + 0.2 * seed
    apart: dict[str, Any] = {"loss/web": web, "loss/code": code, "accuracy/web": 0.25}
    if split == "eval":
        for name, loss in (("web", web), ("code", code)):
            bits = loss / math.log(2) * TOKENS[name] / BYTES[name]
            apart[f"bits_per_byte/{name}"] = bits
    elif step == 20:  # no row of the batch was of this source
        apart |= {"loss/code": "NaN"}
    return apart


def about(seed: int) -> dict[str, Any]:
    config = workdirs.config(train__seed=seed)
    evaluated = {"rows": 2, "tokens": 150, "bytes": 500}
    saved = workdirs.saved(config, mixture=MIXTURE, evaluated=evaluated)
    return {k: v for k, v in saved.items() if k != "heldout_bytes_per_token"}


def write(folder: Path, seed: int = 0, of: dict[str, Any] | None = None) -> Path:
    rows = []
    for step in STEPS:
        for split in ("train", "eval"):
            row = workdirs.row(step, split, seed) | losses(step, seed, split)
            rows.append(row | {"bits_per_byte": row["loss"] / math.log(2) * 0.3})
    return workdirs.write(folder, rows, of or about(seed), seed)


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    return RunData.read(write(tmp_path / "run"))


def test_the_curves_show_each_source_in_training_and_held_out(run: RunData):
    figure = blocks.figures(curves.page(run))["loss-by-source"]
    lines = {trace["name"]: (trace["x"], trace["y"]) for trace in figure.spec["data"]}
    assert list(lines) == [f"{n}, {s}" for n in TOKENS for s in ("training", "held out")]
    x, y = lines["code, held out"]
    assert x == list(STEPS) and y == pytest.approx([2 + 1 / step for step in STEPS])
    assert lines["code, training"][0] == [10, 30], "a source without rows has no loss"
    caption = blocks.figures(curves.page(run))["curve-accuracy/web"].caption
    assert caption.startswith("Share of the source's tokens")


def test_the_overview_has_the_held_out_loss_of_each_source(run: RunData):
    facts = blocks.facts(overview.page(run), "outcome")
    assert facts["loss on web"] == f"{3 + 1 / 30:.4f} nats/token"
    assert facts["loss on code"] == f"{2 + 1 / 30:.4f} nats/token"


def test_a_run_on_one_text_has_none_of_this(tmp_path: Path):
    run = RunData.read(workdirs.write(tmp_path / "run"))
    assert "loss-by-source" not in blocks.figures(curves.page(run))
    assert not [key for key in blocks.facts(overview.page(run), "outcome") if " on " in key]


def test_losses_per_byte_are_of_each_sources_own_bytes(run: RunData):
    per_byte = run.per_byte()
    assert per_byte.held_out[-1]["loss/web"] == pytest.approx((3 + 1 / 30) / 4)
    assert per_byte.held_out[-1]["loss/code"] == pytest.approx((2 + 1 / 30) / 2)
    assert per_byte.train[0]["loss/code"] == pytest.approx((2 + 1 / 10) / 2)


def test_several_runs_are_compared_on_each_source(tmp_path: Path):
    runs = [RunData.read(write(tmp_path / f"run{seed}", seed)) for seed in (0, 1)]
    several = beside(runs)
    cells = {row[0]: row[1:] for row in several_runs.outcomes(several).rows}
    assert cells["loss on code"] == (f"{2 + 1 / 30:.4f}", f"{2.2 + 1 / 30:.4f}")
    named = blocks.options(several_runs.curves(several), "metric")
    assert {"held-out loss of web", "training loss of code"} <= set(named)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two variants of two seeds whose runs are on a mixture."""
    folder = sweeps.write(tmp_path / "sweep", finished=False)
    for number, trial in enumerate(json.loads((folder / "sweep.json").read_text())["trials"]):
        seed = trial["seed"]
        of = about(seed) | {"config": trial["config"]}
        write(folder / "trials" / trial["name"], seed + 2 * (number // 2), of)
    return folder


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The table; the folder's trials lack what else a run leaves at its end."""
    monkeypatch.setattr(results.folders, "finished", lambda folder, trial: True)
    return summary.write(Sweep("page.py", read_index(folder).trials), folder)


def test_a_sweep_compares_the_variants_on_each_source(sweep: Path, monkeypatch: pytest.MonkeyPatch):
    table = written(sweep, monkeypatch)
    found = json.loads((sweep / "summary.json").read_text())
    for place, variant in enumerate(found["variants"]):
        for name, base, slope in (("web", 3, 0.1), ("code", 2, 0.2)):
            of_seeds = [base + 1 / 30 + slope * (seed + 2 * place) for seed in (0, 1)]
            mean = sum(of_seeds) / 2 * TOKENS[name] / BYTES[name]
            assert variant["by_source"][name]["mean"] == pytest.approx(mean)
            assert variant["by_source"][name]["half_width"] > 0
            assert f"{mean:.4f}" in table
    assert "loss on" in table
    rows = list(csv.DictReader((sweep / "results.csv").read_text().splitlines()))
    assert float(rows[0]["loss/web"]) == pytest.approx((3 + 1 / 30) / 4)
    data = SweepData.read(sweep)
    tables = [block for block in sweep_overview.page(data).blocks if isinstance(block, Table)]
    own = next(table for table in tables if "loss on web, nats/byte" in table.header)
    mean = found["variants"][0]["by_source"]["code"]["mean"]
    assert own.rows[0][2].startswith(f"{mean:.4f} ± ")
    assert "held-out loss of code" in blocks.options(sweep_curves.page(data), "metric")


def test_a_sweep_on_one_text_has_no_losses_by_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = sweeps.write(tmp_path / "sweep")
    table = written(folder, monkeypatch)
    assert "loss on" not in table and "by_source" not in (folder / "summary.json").read_text()
    assert "loss/" not in (folder / "results.csv").read_text()
