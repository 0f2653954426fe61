"""Runs with the gates that balance a group or decide late: marks, metrics, state, resuming."""

import json

import pytest

from moejax.train.checkpoint.checkpointer import Checkpointer
from tests.train import runs

RUNS = {
    "base": {},
    "sbase": {"moe__gate__evaluation": "ema", "moe__gate__ema_decay": 0.5},
    "dselect_k": {"moe__gate__max_active": 3},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(RUNS))
def finished(request, tmp_path_factory):
    """A run of four steps, stopped after two and resumed."""
    folder = tmp_path_factory.mktemp("gates")
    text = runs.write_text(folder / "text")
    changes = {"moe__gate__name": request.param, "moe__losses__load": 0.0, "train__log_every": 1,
               "train__checkpoint_every": 2, **RUNS[request.param]}  # fmt: skip
    for steps in (2, 4):
        ended = runs.call(runs.command(folder / "run", text, train__steps=steps, **changes))
        assert ended.status == 0, ended.err
    return request.param, folder / "run"


def test_every_row_has_the_mark_of_a_leak_in_training_only(finished):
    gate, workdir = finished
    rows = runs.rows(workdir)
    wanted = "" if gate == "dselect_k" else "train:future"
    assert {row["leak"] for row in rows} == {wanted}
    assert json.loads((workdir / "config.json").read_text())["visibility"] == wanted
    assert {row["split"] for row in rows} == {"train", "eval"}


def test_the_gates_own_numbers_are_in_the_rows(finished):
    gate, workdir = finished
    train, held_out = runs.rows(workdir, "train"), runs.rows(workdir, "eval")
    assert len(train) == 4
    for row in train:
        own = {name: value for name, value in row.items() if name.startswith("moe/gate/")}
        if gate == "base":
            assert own.keys() == {"moe/gate/assignment_gap"}
            assert 0 <= own["moe/gate/assignment_gap"] < 1e-5  # float32 prices
            assert row["moe/drop_rate"] == row["moe/max_vio"] == 0
        elif gate == "sbase":
            assert own.keys() == {"moe/gate/column_error", "moe/gate/residual_imbalance"}
            assert own["moe/gate/residual_imbalance"] > own["moe/gate/column_error"] >= 0
        else:
            assert own["moe/gate/selector_entropy"] > 1
            # All four experts are wanted at first; the fourth is cut, and counted.
            assert row["moe/experts_per_token"] == 4 and row["moe/drop_rate"] == 0.25
            assert row["aux/dselect_entropy"] > 0
    for row in held_out:
        assert row["moe/drop_rate"] == (0.25 if gate == "dselect_k" else 0)
        assert (row["moe/max_vio"] > 0) == (gate != "dselect_k"), "evaluation is not balanced"


def test_the_state_is_checkpointed_and_resumed(finished):
    gate, workdir = finished
    assert Checkpointer(workdir / "checkpoints", read_only=True).steps() == [2, 4]
    evaluated = runs.call(["eval", f"--workdir={workdir}"])
    assert json.loads(evaluated.out) == runs.rows(workdir, "eval")[-1], gate
