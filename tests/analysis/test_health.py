"""Runs with and without warnings."""

import math
from pathlib import Path
from typing import Any

import pytest

from moejax.analysis import health
from moejax.analysis.run import RunData
from tests.analysis import workdirs


def run_of(tmp_path: Path, rows: list[dict[str, Any]], **about: Any) -> RunData:
    return RunData.read(workdirs.write(tmp_path / "run", rows, workdirs.saved(**about)))


def found(run: RunData) -> dict[str, str]:
    return dict(health.findings(run))


def losses(*values: float | str, steps: int = 10) -> list[dict[str, Any]]:
    """A training and a held-out row at each of steps, 2 steps, ... with these held-out losses."""
    rows = []
    for number, loss in enumerate(values, 1):
        rows += [workdirs.row(number * steps), workdirs.row(number * steps, "eval", loss=loss)]
    return rows


def test_a_converged_balanced_finished_run_has_no_warning(tmp_path: Path):
    assert found(run_of(tmp_path, losses(2.1, 2.001, 2.0))) == {}


def test_an_unfinished_run_shows_its_progress(tmp_path: Path):
    said = found(run_of(tmp_path, losses(2.0, 2.0)))
    assert list(said) == ["unfinished"] and "step 20 of 30" in said["unfinished"]


def test_a_diverged_run_repeats_its_own_message(tmp_path: Path):
    run = run_of(tmp_path, losses(2.0))
    why = "moejax: diverged at step 17: the loss is finite but its gradient is not; lower it"
    (run.workdir / "log.txt").write_text(f"step 10/30\n{why}\n")
    assert found(run)["diverged"].endswith(why) and "unfinished" not in found(run)


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path: Path):
    rows = [workdirs.row(10), workdirs.row(20, loss="NaN"), *losses(2.0, 2.0, 2.0)[4:]]
    assert found(run_of(tmp_path, rows))["not finite"].startswith(
        "train loss is not finite at step 20"
    )


def test_a_loss_that_rose_and_one_that_beat_no_baseline(tmp_path: Path):
    said = found(run_of(tmp_path, losses(2.0, 3.2, 3.1)))
    assert "lowest, 2.0000 at step 10" in said["loss rose"]
    assert "unigram (3.0000), bigram (2.5000)" in said["above baselines"]
    assert "above baselines" not in found(run_of(tmp_path / "b", losses(2.6, 2.6, 2.6)))


def test_a_loss_that_still_falls_is_compared_with_three_quarters_of_the_run(tmp_path: Path):
    rows = losses(3.0, 2.4, 2.2, 2.0)
    about = workdirs.config(train__steps=40)
    said = found(run_of(tmp_path, rows, config=about))["not converged"]
    assert "fell by 9.1% since step 30 of 40, so that" in said


def test_the_step_of_the_comparison_is_named_where_no_quarter_ends(tmp_path: Path):
    said = found(run_of(tmp_path, losses(3.0, 2.2, 2.0)))["not converged"]  # 30 steps
    assert "fell by 9.1% since step 20 of 30, so that" in said
    two = workdirs.config(train__steps=20)
    said = found(run_of(tmp_path / "b", losses(3.0, 2.0), config=two))["not converged"]
    assert "fell by 33.3% since step 10 of 20, so that" in said


def with_load(load: list[list[int]], step: int) -> dict[str, Any]:
    return workdirs.row(step) | {"moe/load": load}


def test_dead_experts_and_collapse_are_measured_over_the_last_quarter(tmp_path: Path):
    even, uneven = [[16] * 4, [16] * 4], [[0, 0, 60, 4], [16] * 4]
    rows = [with_load(even, step) for step in (1, 2, 3, 4, 5, 6)]
    rows += [with_load(uneven, 7), with_load(uneven, 8), workdirs.row(30, "eval", loss=2.0)]
    said = found(run_of(tmp_path, rows))
    assert "2 of 8" in said["dead experts"] and "layer 0: 0, 1" in said["dead experts"]
    share = (60 / 64, 4 / 64)
    effective = math.exp(-sum(p * math.log(p) for p in share))
    assert f"layer 0 as if there were {effective:.1f}" in said["collapse"]
    assert "layer 1" not in said["collapse"] + said["dead experts"]
    healed = [*rows[6:8], *rows[:6], rows[8]]
    assert not {"dead experts", "collapse"} & found(run_of(tmp_path / "b", healed)).keys()


def test_drops_above_a_tenth_are_a_warning(tmp_path: Path):
    rows = [workdirs.row(30, moe__drop_rate=0.11, moe__unserved_rate=0.04)]
    said = found(run_of(tmp_path, [*rows, workdirs.row(30, "eval", loss=2.0)]))
    assert said == {"drops": "11.0% of (token, expert) pairs are dropped in training (mean of the "
                    "last quarter of rows)."}  # fmt: skip


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (
            "train:future+others",
            "later tokens of its sequence and other sequences of the batch in training.",
        ),
        (
            "train:others eval:future",
            "other sequences of the batch in training and on later tokens of its sequence in "
            "evaluation.",
        ),
    ],
)
def test_a_leak_is_explained(mark: str, said: str):
    assert health.explain(mark) == f"a token's output may depend on {said}"


def test_a_leak_in_evaluation_asks_for_a_measurement_and_a_measured_one_is_reported(tmp_path: Path):
    mark = "train:future eval:future"
    rows = [workdirs.row(30, leak=mark), workdirs.row(30, "eval", loss=2.0, leak=mark)]
    assert "--measure-leak" in found(run_of(tmp_path, rows))["leak"]
    measured = {
        "leak__with_future": 1.5, "leak__without_future": 1.75, "leak__nats_per_token": 0.25,
        "leak__tokens": 64,
    }  # fmt: skip
    rows[1] = workdirs.row(30, "eval", loss=2.0, leak=mark, **measured)
    text = found(run_of(tmp_path / "b", rows))["leak"]
    assert "0.2500 nats/byte (1.5000 with" in text and "--measure-leak" not in text


def test_a_leak_in_training_alone_is_marked_without_a_measurement(tmp_path: Path):
    rows = [workdirs.row(30, leak="train:others"), workdirs.row(30, "eval", leak="train:others")]
    assert "--measure-leak" not in found(run_of(tmp_path, rows))["leak"]
