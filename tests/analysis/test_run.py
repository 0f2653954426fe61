"""Reading workdirs, good ones and others."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moejax.analysis.run import SAVED, RunData
from moejax.config.versions import SCHEMA
from moejax.errors import UserError
from tests.analysis import workdirs


def test_a_run_is_read_from_its_files(tmp_path: Path):
    rows = [workdirs.row(10), workdirs.row(20), workdirs.row(20, "eval"), workdirs.row(30)]
    run = RunData.read(workdirs.write(tmp_path / "a run", rows))
    assert run.name == "a run" and run.problems == []
    assert run.saved == {**workdirs.saved(), "schema": SCHEMA} and run.config == run.saved["config"]
    assert run.train == [rows[0], rows[1], rows[3]] and run.held_out == [rows[2]]
    assert run.timings == [workdirs.timing(step) for step in (10, 20, 30)]
    assert run.field("moe.gate.name") == "top_k" and run.field("moe.nothing.here", 7) == 7
    steps, load = run.arrays("train", "moe/load")
    assert steps.tolist() == [10, 20, 30]
    assert np.array_equal(load, [row["moe/load"] for row in run.train])
    assert run.last_step == 30 and run.has_experts and not run.finished


def test_a_finished_run_has_evaluated_its_last_step(tmp_path: Path):
    assert RunData.read(workdirs.write(tmp_path / "a")).finished


def test_a_torn_last_line_is_left_out_and_any_other_bad_line_is_a_problem(tmp_path: Path):
    path = workdirs.write(tmp_path / "a") / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + whole[0][:40])
    run = RunData.read(tmp_path / "a")
    assert (len(run.train), len(run.held_out), run.problems) == (3, 2, [])
    path.write_text("".join([whole[0], "rubbish\n", '{"split": "train"}\n', *whole[1:]]))
    run = RunData.read(tmp_path / "a")
    assert len(run.train) == 3
    assert run.problems == ["metrics.jsonl: 2 lines are not rows and were skipped (2, 3)."]


def test_a_row_with_impossible_values_is_left_out_and_reported(tmp_path: Path):
    path = workdirs.write(tmp_path / "a") / "metrics.jsonl"
    row = {**workdirs.row(10), "moe/load": [[1, 2]]}
    bad = [{"loss": "x"}, {"split": 1}, {"moe/load": 5}, {"moe/load": [[1], [1, 2]]}]
    bad.append({"moe/load": [["x"]]})
    path.write_text("".join(json.dumps(row | change) + "\n" for change in [{}, *bad]))
    run = RunData.read(tmp_path / "a")
    assert len(run.train) == 1
    assert "metrics.jsonl: 5 lines are not rows and were skipped (2, 3, 4, 5, 6)." in run.problems


def test_a_run_that_has_written_its_config_alone_is_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(workdirs.saved()))
    run = RunData.read(tmp_path)
    assert run.train == run.held_out == run.timings == [] and run.last_step == 0
    assert len(run.problems) == 2 and "metrics.jsonl cannot be read" in run.problems[0]
    assert run.series("train", "loss")[0].size == 0 and not run.has_experts


def test_a_run_of_another_version_names_what_is_missing(tmp_path: Path):
    workdir = workdirs.write(tmp_path / "a", about={"config": {"train": {}}, "version": "0.0.1"})
    run = RunData.read(workdir)
    assert len(run.problems) == 1 and "moejax 0.0.1 wrote it" in run.problems[0]
    assert all(name in run.problems[0] for name in SAVED if name != "version")


def test_values_that_are_not_finite_come_back(tmp_path: Path):
    workdirs.write(tmp_path / "a", [workdirs.row(10, loss="NaN", grad_norm="-Infinity")])
    run = RunData.read(tmp_path / "a")
    assert math.isnan(run.train[0]["loss"]) and run.series("train", "grad_norm")[1] == [-math.inf]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is .* the workdir of a run"), ("{", "not valid JSON"), ("[]", "not written by")],
)
def test_a_folder_without_a_run_is_refused_in_one_line(
    tmp_path: Path, content: str | None, said: str
):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        RunData.read(tmp_path)
    assert "\n" not in str(refused.value)
