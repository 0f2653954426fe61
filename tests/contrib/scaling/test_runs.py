"""The rows of a table that count, and the runs that a sweep's trials give the law."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

from moejax.contrib.scaling.runs import CURVES, DENSE, RESULTS, Run, read_source
from moejax.errors import UserError
from moejax.tasks.language.model import LM
from moejax.train.state import count_parameters
from tests import lms
from tests.contrib.scaling.sources import (
    DENSE_PARAMETERS,
    LAW,
    curve,
    runs_of,
    trial,
    write_curves,
    write_sweep,
)  # fmt: skip

RUN = Run("R", 1e6, 8, 42, 2.5)


@pytest.mark.parametrize("name", ["curves.csv", "curves.csv.gz"])
def test_the_last_evaluation_with_a_loss_counts_for_each_run(tmp_path: Path, name: str):
    rows = [
        curve(7, RUN, step=99, loss_validation=2.6),
        curve(7, RUN, step=100),
        curve(7, RUN, step=0, loss_validation=9.0),
        curve(7, RUN, step=101, loss_validation=""),
    ]
    (found,) = read_source(str(write_curves(tmp_path / name, rows))).runs
    assert found == Run("R", 1e6, 8, 42, 2.5, "hyper_id=7")


def test_runs_of_other_architectures_are_ignored(tmp_path: Path):
    rows = [curve(0, RUN), curve(1, RUN, k=2), curve(2, RUN, routing_frequency=0.25)]
    rows.append(curve(3, Run(DENSE, 1e6, 1, 42, 2.9), flop_increase=4.0))
    source = read_source(str(write_curves(tmp_path / "c.csv", rows)))
    assert [run.name for run in source.runs] == ["hyper_id=0"]
    assert "1 of 4 runs" in source.notes[0] and source.unit == "nats/token"


MISTAKES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], list[str]]] = {
    "word": (
        lambda rows: rows[1].update(loss_validation="low"),
        ["loss_validation='low'", "run 1"],
    ),
    "nan": (lambda rows: rows[1].update(num_experts="nan"), ["num_experts='nan'", "run 1"]),
    "negative": (lambda rows: rows[0].update(loss_validation=-1.0), ["above 0", "run 0"]),
    "half": (lambda rows: rows[1].update(num_experts=2.5), ["num_experts=2.5", "whole number"]),
    "zero": (lambda rows: rows[0].update(dense_parameter_count=0), ["dense_parameter_count=0"]),
    "short": (lambda rows: rows[1].update(step=50), ["hyper_id=1 ends at step 50", "100"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_bad_value_is_named_with_its_run(tmp_path: Path, kind: str):
    change, parts = MISTAKES[kind]
    rows = [curve(number, run) for number, run in enumerate(runs_of(LAW)[:3])]
    change(rows)
    with pytest.raises(UserError) as error:
        read_source(str(write_curves(tmp_path / "c.csv", rows)))
    assert all(part in str(error.value) for part in parts), error.value


def test_missing_columns_are_named(tmp_path: Path):
    path = write_curves(tmp_path / "c.csv", [curve(0, RUN)], CURVES[:-2])
    with pytest.raises(UserError, match="no column flop_increase, dense_parameter_count"):
        read_source(str(path))


def test_an_invalid_table_is_refused(tmp_path: Path):
    (tmp_path / "c.csv.gz").write_text("not compressed")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_source(str(tmp_path / "c.csv.gz"))
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_source(str(tmp_path / "c.csv"))
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match="has no column hyper_id"):
        read_source(str(tmp_path / "empty.csv"))
    with pytest.raises(UserError, match="does not exist"):
        read_source(str(tmp_path / "nothing"))


def test_a_truncated_table_is_refused(tmp_path: Path):
    path = write_curves(tmp_path / "c.csv", [curve(0, RUN), curve(1, RUN)])
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match="fewer cells than columns"):
        read_source(str(path))
    whole = write_curves(tmp_path / "c.csv.gz", [curve(n, RUN) for n in range(100)])
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_source(str(whole))


# Sweeps.


def loss(experts: int, seed: int) -> float:
    return 2.0 - 0.01 * experts + 0.001 * seed


def test_a_trial_gives_its_router_dense_size_experts_and_loss(tmp_path: Path):
    """switch with 4 experts: the dense model and a router of 8 x 4 in two layers."""
    trials = [trial("a", "switch", 4), trial("b", "switch", 32), trial("c", "hash", 32)]
    source = read_source(str(write_sweep(tmp_path / "s", trials, loss, seeds=2)))
    assert source.unit == "nats/byte" and source.routers == ["switch", "hash"]
    # One model, so one size: that with the fewest router's parameters.
    assert {run.size for run in source.runs} == {DENSE_PARAMETERS}
    assert source.runs[1] == Run("switch", DENSE_PARAMETERS, 4, 1, loss(4, 1), "a-seed1")
    alone = read_source(str(write_sweep(tmp_path / "t", trials[:1], loss)))
    assert alone.runs[0].size == DENSE_PARAMETERS + 2 * 8 * 4


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_size_of_a_routed_model_is_the_parameters_of_the_dense_one(
    tmp_path: Path, activation: str
):
    """Counted on models: routed by hash, without a router's parameters, and dense."""
    common: dict[str, Any] = {"activation": activation, "expert_activation": activation, "d_ff": 12}
    settings = lms.config(
        "hash", {"num_experts": 4}, num_layers=5, every=2, first_dense=1, **common
    )
    total, dense = (
        count_parameters(nnx.state(nnx.eval_shape(lambda s=s: LM(s, rngs=nnx.Rngs(0)))))
        for s in (settings, lms.changed(settings, every=0))
    )
    name, config = trial("a", "hash", 4, activation=activation, every=2, first_dense=1, d_ff=12)
    config["model"] = {"d_model": lms.D, "num_layers": 5}
    folder = write_sweep(tmp_path / "s", [(name, config)], loss, seeds=1)
    table = f"{','.join(RESULTS)}\na,0,1,2.0,{total}\n"
    (folder / "results.csv").write_text(table)
    (run,) = read_source(str(folder)).runs
    assert total > dense and run.size == dense


def test_models_of_different_width_have_different_sizes_and_k_is_part_of_the_router(tmp_path: Path):
    narrow, wide = trial("a", "top_k", 4), trial("b", "top_k", 4, d_ff=32)
    two = trial("c", "top_k", 4, k=2)
    source = read_source(str(write_sweep(tmp_path / "s", [narrow, wide, two], loss, seeds=1)))
    assert len({run.size for run in source.runs}) == 2
    assert source.routers == ["top_k", "top_k k=2"]


def test_a_dense_model_of_the_same_size_is_every_routers_first_point(tmp_path: Path):
    trials = [trial("a", "switch", 4), trial("b", "hash", 4), trial("dense", "switch", 8, every=0)]
    folder = write_sweep(tmp_path / "s", trials, loss, seeds=1)
    source = read_source(str(folder))
    assert [(r.router, r.experts) for r in source.of("switch")] == [(DENSE, 1), ("switch", 4)]
    assert len({run.size for run in source.of("switch")}) == 1
    table = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(table.replace(f",{DENSE_PARAMETERS}\n", ",4000\n"))
    other = read_source(str(folder))
    assert [run.router for run in other.of("switch")] == ["switch"]


def test_unfinished_trials_are_left_out_and_counted(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", [trial("a", "switch", 4)], loss, seeds=2)
    table = (folder / "results.csv").read_text()
    (folder / "results.csv").write_text(table.replace(f"a,1,1,{loss(4, 1)}", "a,1,0,"))
    source = read_source(str(folder))
    assert [run.seed for run in source.runs] == [0] and "1 trials are not" in source.notes[1]


def test_two_variants_of_one_router_and_number_of_experts_are_refused(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", [trial("a", "switch", 4), trial("b", "switch", 4)], loss)
    with pytest.raises(UserError, match="'a' and 'b' are both switch with E=4"):
        read_source(str(folder))


def test_a_folder_that_is_no_ended_sweep_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no sweep.json"):
        read_source(str(tmp_path))
    folder = write_sweep(tmp_path / "s", [trial("a", "switch", 4)], loss)
    (folder / "results.csv").unlink()
    with pytest.raises(UserError, match="results.csv does not exist"):
        read_source(str(folder))
    (folder / "results.csv").write_text(",".join(RESULTS) + "\nx,0,1,2.0,100\n")
    with pytest.raises(UserError, match="trial 'x-seed0' that sweep.json lacks"):
        read_source(str(folder))
    for content in ("{", json.dumps({"trials": [{"config": {}}]}), "[]"):
        (folder / "sweep.json").write_text(content)
        with pytest.raises(UserError, match="was not written by `moejax sweep`"):
            read_source(str(folder))
