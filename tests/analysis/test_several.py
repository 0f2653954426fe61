"""``moejax report A B``: comparisons of runs or sweeps, and refused comparisons."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moejax import cli
from moejax.analysis.page import Page, Warning
from moejax.analysis.pages import several_runs, several_sweeps
from moejax.analysis.report import of_several
from moejax.analysis.run import RunData
from moejax.analysis.several import Several, beside
from moejax.analysis.sweep import SweepData
from tests.analysis import blocks, sweeps, workdirs
from tests.analysis.test_scales import check


def run(folder: Path, changes: Mapping[str, Any] = {}, about: Mapping[str, Any] = {}, seed=0):  # noqa: B006
    """A run with other fields of the config, and other entries of config.json."""
    config = workdirs.config(**changes)
    return workdirs.write(folder, about=workdirs.saved(config, **about), seed=seed)


def runs(*folders: Path) -> Several:
    return beside([RunData.read(folder) for folder in folders])


def column(page: Page, first: str, number: int) -> dict[str, str]:
    return {row[0]: row[number] for row in blocks.table(page, first).rows}


def drawn(several: Several, *pages: Any) -> None:
    for page in pages:
        for name, figure in blocks.figures(page(several)).items():
            check(name, figure)
    assert of_several(several).startswith("<!doctype html>")


def test_runs_are_compared_by_config_outcome_and_curves(tmp_path: Path):
    a = run(tmp_path / "a")
    b = run(tmp_path / "b", {"moe__gate__name": "switch", "train__seed": 3}, seed=1)
    several = runs(a, b)
    page = several_runs.page(several)
    fields = blocks.table(page, "field")
    assert fields.rows[0] == ("moe.gate.name", "'top_k'", "'switch'")
    assert ("train.seed", "0", "3") in fields.rows
    losses = [each.held_out[-1]["loss"] for each in several.runs.values()]
    second = column(page, "outcome", 2)
    assert second["held-out loss, nats/byte"] == f"{losses[1]:.4f}"
    assert second["minus that of the first"] == f"{losses[1] - losses[0]:+.4f}"
    assert second["pairs dropped, evaluation"] == "0.00%" and second["seed"] == "3"
    assert list(second).index("pairs dropped, training") < list(second).index(
        "pairs dropped, evaluation"
    )
    curves = {t["name"]: t["y"] for t in blocks.figures(page)["loss"].spec["data"]}
    assert curves["b, held out"] == [row["loss"] for row in several.runs["b"].held_out]
    drawn(several, several_runs.page, several_runs.curves, several_runs.loads)


def test_a_leak_is_marked_wherever_the_run_is_named(tmp_path: Path):
    a = run(tmp_path / "a")
    rows = [workdirs.row(30, split, leak="train:future") for split in ("train", "eval")]
    b = workdirs.write(tmp_path / "b", rows)
    page = several_runs.page(runs(a, b))
    assert column(page, "outcome", 2)["leak"] == "train:future"
    assert column(page, "outcome", 1)["leak"] == "none"
    assert "b †: Leaks (train:future)" in blocks.said(page)
    assert {"a, training", "b †, training"} <= {
        t["name"] for t in blocks.figures(page)["loss"].spec["data"]
    }


def test_runs_on_different_data_get_a_warning_and_no_difference(tmp_path: Path):
    several = runs(run(tmp_path / "a"), run(tmp_path / "b", about={"fingerprint": "cd" * 32}))
    page = several_runs.page(several)
    assert "minus that of the first" not in column(page, "outcome", 2)
    first = next(block for block in page.blocks if isinstance(block, Warning))
    assert first.text.startswith("The data differ (by fingerprint)")


def test_runs_with_other_tokens_are_compared_per_byte(tmp_path: Path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", about={"heldout_bytes_per_token": 2.5})
    rows = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "eval":
            row["bits_per_byte"] = row["loss"] / math.log(2) / 2.5
    workdirs.lines(b / "metrics.jsonl", rows)
    several = runs(a, b)
    assert several.unit == "nats/byte" and "nats/token" not in of_several(several)
    curves = {
        t["name"]: t["y"] for t in blocks.figures(several_runs.page(several))["loss"].spec["data"]
    }
    own = [row["loss"] / 2.5 for row in rows if row["split"] == "eval"]
    assert curves["b, held out"] == pytest.approx(own, rel=1e-12)
    both = runs(b, run(tmp_path / "c", about={"heldout_bytes_per_token": 2.5}))
    assert both.unit == "nats/token", "the same tokens need no conversion"


def test_folders_with_the_same_name_get_distinct_names(tmp_path: Path):
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    several = runs(run(tmp_path / "one/run"), run(tmp_path / "two/run"))
    assert several.names == ("one/run", "two/run")


def test_sweeps_are_compared_by_variant_at_equal_seeds(tmp_path: Path):
    folders = [sweeps.write(tmp_path / name, seeds=(0, 1)) for name in ("s", "t")]
    for number, trial in enumerate(sorted((folders[1] / "trials").iterdir())):
        rows = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row["loss"] += 0.25 + 0.01 * (number % 2)
        workdirs.lines(trial / "metrics.jsonl", rows)
    several = beside([SweepData.read(folder) for folder in folders])
    page = several_sweeps.page(several)
    table = blocks.table(page, "variant")
    assert [row[:3] for row in table.rows] == [
        ("switch", "s", "2"), ("switch", "t", "2"), ("top_2", "s", "2"), ("top_2", "t", "2"),
    ]  # fmt: skip
    # Differences 0.25 and 0.26: Student's t of one degree of freedom, 12.706, times 0.005.
    assert table.rows[1][4] == "+0.2550 ± 0.0635" and table.rows[0][4] == "-"
    assert "The trials of the sweeps have the same values" in blocks.said(page)
    drawn(several, several_sweeps.page, several_sweeps.curves)


def test_the_command_writes_one_file_beside_the_first(tmp_path: Path, capsys: Any):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert cli.main(["report", str(a), str(b)]) == 0
    out, err = capsys.readouterr()
    written = a / "compare-b.html"
    assert err == "" and out.startswith(f"{written}  ") and "a and b" in written.read_text()
    assert not (a / "report.html").exists() and not list(b.glob("*.html"))
    assert cli.main(["report", str(b), str(a), "-o", str(tmp_path / "c.html")]) == 0
    assert (tmp_path / "c.html").exists() and not list(b.glob("*.html"))


def test_incomparable_folders_are_refused_in_one_line(tmp_path: Path, capsys: Any):
    a = run(tmp_path / "a")
    sweep = sweeps.write(tmp_path / "sweep", seeds=(0,))
    images = workdirs.saved(units={"item": "image", "loss": "nats/image", "tokens_per_row": 1})
    images.pop("heldout_bytes_per_token")
    images["config"] = json.loads(json.dumps(images["config"]))
    images["config"]["task"] = {"name": "images"}
    other = workdirs.write(tmp_path / "images", about=images)
    mse = dict(images) | {"units": {"item": "token", "loss": "mse", "tokens_per_row": 1}}
    mse["config"] = workdirs.config()
    squared = workdirs.write(tmp_path / "mse", about=mse)
    unknown = run(tmp_path / "unknown", about={"heldout_bytes_per_token": 2.5})
    rows = [{k: v for k, v in workdirs.row(30, "eval").items() if k != "bits_per_byte"}]
    workdirs.lines(unknown / "metrics.jsonl", rows)
    for words, said in {
        (a, sweep): ["is a run", "is a sweep", "trials/"],
        (a, a): ["named twice"],
        (a, tmp_path / "nothing"): ["nothing does not exist"],
        (a, other): ["task.name='language'", "task.name='images'"],
        (a, squared): ["nats/byte", "in mse"],
        (a, unknown): ["nats/token", "bits per byte"],
        (a, sweep, "--measure-leak"): ["--measure-leak works on one folder"],
        (a, other, "--tensorboard"): ["--tensorboard works on one folder"],
        (a, other, "--openmoe"): ["--openmoe works on one folder"],
        (a,) * 9: ["9 folders are too many"],
    }.items():
        assert cli.main(["report", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and all(part in err for part in said), err
    assert not list(tmp_path.rglob("*.html"))
