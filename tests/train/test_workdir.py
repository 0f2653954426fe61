"""The effect of the same command, or another, on a workdir that is not empty."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax.tasks.task import Totals
from moejax.train import loop, setup
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.metrics import console, rows
from moejax.train.workdir import summary
from tests.train import runs
from tests.train.runs import STEPS, call, command, copy, refused
from tests.train.sharing import Shared, Whole, prepared


@pytest.mark.slow
def test_repeating_a_finished_command_reports_it_and_changes_no_byte(whole: Whole, text: Path):
    before = runs.files(whole.workdir)
    for changes in ({}, {"report.progress": False}, {"train.keep_checkpoints": 1}):
        ended = call(command(whole.workdir, text, **changes))
        assert (ended.status, ended.err) == (0, "")
        assert f"{whole.workdir} is complete at step {STEPS}" in ended.out
        assert "compiling" not in ended.out
    assert call(command(whole.workdir, text, train__steps=5)).status == 0
    assert runs.files(whole.workdir) == before


def test_a_run_killed_before_its_picture_gets_it_from_the_same_command(
    whole: Whole, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(console, "write_summary_png", summary.write_summary_png)
    workdir = copy(whole.workdir, tmp_path / "run")
    (workdir / "summary.png").unlink()
    assert call(command(workdir, text)).status == 0
    names = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    for name in names:
        if name.name not in (".lock", "summary.png"):
            assert (workdir / name).read_bytes() == (whole.workdir / name).read_bytes()
    assert (workdir / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_raising_the_steps_continues_where_the_shorter_run_ended(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    assert call(command(workdir, text, train__steps=5)).status == 0
    assert [row["step"] for row in runs.rows(workdir)] == [3, 5, 5]  # last: logged, evaluated
    ended = call(command(workdir, text))
    assert ended.status == 0 and f"resuming {workdir} at step 5" in ended.out
    rows_found = [row for row in runs.rows(workdir) if row["step"] != 5]
    assert rows_found == runs.rows(whole.workdir)
    assert runs.same_bits(runs.saved(workdir, whole.run), runs.saved(whole.workdir, whole.run))
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["train"]["steps"] == STEPS


@pytest.mark.parametrize(
    "field, value",
    [("train.seed", 1), ("optim.b1", 0.8), ("moe.capacity_factor", 2.0)],
)
def test_a_changed_field_is_refused_by_name(field: str, value: Any, whole: Whole, text: Path):
    before = runs.files(whole.workdir)
    refused(command(whole.workdir, text, **{field: value}), f"{field}={value}", "--workdir")
    assert runs.files(whole.workdir) == before


def test_changed_text_is_refused_in_training_and_evaluation(whole: Whole, text: Path):
    file = text / "0.txt"
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[:-1] + b"!")
        refused(command(whole.workdir, text), f"data.path='{text}'", "not those the run began")
        refused(["eval", f"--workdir={whole.workdir}"], f"data.path='{text}'")
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("[]", "was not written by"),
        ('{"a": 1}', "was not written by"),
        ('{"config": [], "fingerprint": "", "baselines": {}}', "was not written by"),
    ],
)
def test_a_workdir_with_a_foreign_config_is_refused(
    content: str | bytes, said: str, shared: Shared, text: Path, tmp_path: Path
):
    (tmp_path / "run").mkdir()
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "run/config.json").write_bytes(content)
    refused(command(tmp_path / "run", text), "run/config.json", said)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_folder_of_something_else_or_that_cannot_be_created_is_refused(
    shared: Shared, text: Path, tmp_path: Path
):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("")
    refused(command(tmp_path / "notes", text), f"--workdir={tmp_path}/notes is not empty")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.tex"]
    (tmp_path / "notes/log.txt").write_text("")  # which alone would be no hindrance
    refused(command(tmp_path / "notes", text), f"--workdir={tmp_path}/notes is not empty")
    below_a_file = tmp_path / "notes/thesis.tex/run"
    refused(command(below_a_file, text), f"--workdir={below_a_file}")


def test_a_workdir_that_cannot_be_written_to_is_refused_before_anything_is_compiled(
    shared: Shared, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "run").mkdir(mode=0o555)
    # The superuser, as whom tests may run, can write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(command(tmp_path / "run", text), f"--workdir={tmp_path}/run cannot be written to")
    assert not list((tmp_path / "run").iterdir())


def test_cudnn_attention_is_refused_where_there_is_no_gpu(
    shared: Shared, text: Path, tmp_path: Path
):
    changes = {"model.attention": "cudnn", "model.dtype": "bfloat16"}
    refused(command(tmp_path / "run", text, **changes), "model.attention=cudnn", "cpu", "auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_mirror_without_its_package_is_refused_before_anything_is_written(
    name: str, shared: Shared, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    changes = {f"report.{name}": True}
    refused(command(tmp_path / "run", text, **changes), f"report.{name}=True needs", "pip install")
    assert not (tmp_path / "run").exists()


def test_text_too_short_for_one_row_is_refused_before_anything_is_written(
    shared: Shared, tmp_path: Path
):
    short = runs.write_text(tmp_path / "short", letters=15)
    refused(command(tmp_path / "run", short), "train.seq_len=16", "held-out text has 15 tokens")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- evaluation of a checkpoint


def test_eval_prints_the_held_out_row_of_a_checkpoint_and_writes_nothing(
    whole: Whole, capsys: pytest.CaptureFixture[str]
):
    before = runs.files(whole.workdir)
    ended = call(["eval", f"--workdir={whole.workdir}"])
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == runs.rows(whole.workdir, "eval")[-1]
    fewer = json.loads(
        call(["eval", f"--workdir={whole.workdir}", "--config.train.eval_rows=2"]).out
    )
    all_of_it = runs.rows(whole.workdir, "eval")[-1]
    for name in ("bigram", "trigram"):  # baselines follow the evaluated rows, as the loss does
        assert fewer[f"baseline/{name}"] != all_of_it[f"baseline/{name}"]
    ended = call(["eval", f"--workdir={whole.workdir}", "--step=6"])
    assert json.loads(ended.out)["step"] == 6
    refused(["eval", f"--workdir={whole.workdir}", "--step=4"], "step 4", "6, 8")
    assert runs.files(whole.workdir) == before


def test_eval_of_a_run_without_a_checkpoint_is_refused(whole: Whole, tmp_path: Path):
    shutil.copy(whole.workdir / "config.json", tmp_path)
    refused(["eval", f"--workdir={tmp_path}"], f"{tmp_path} has no checkpoint")


def test_eval_of_weights_that_overflow_fails_with_one_line(
    whole: Whole, shared: Shared, monkeypatch: pytest.MonkeyPatch
):
    def endless(state: Any, batch: Any) -> Totals:
        return whole.run.eval_step(state, batch)._replace(loss=np.float32("inf"))

    prepare = setup.prepare

    def prepared(config: Any) -> setup.Run:
        run = prepare(config)
        vars(run)["eval_step"] = endless
        return run

    monkeypatch.setattr(setup, "prepare", prepared)
    ended = call(["eval", f"--workdir={whole.workdir}"])
    assert (ended.status, ended.out) == (1, "") and ended.err.count("\n") == 1
    assert "not finite at step 8" in ended.err


# ---------------------------------------------------------------- warm start


@pytest.mark.slow
def test_init_from_starts_at_step_0_with_only_the_weights_of_the_other_run(
    whole: Whole, shared: Shared, text: Path, tmp_path: Path
):
    first: dict[str, np.ndarray] = {}

    def capture(update: Any) -> Any:
        def step(state: Any, batch: Any) -> Any:
            first.update(first or runs.named(state))
            return update(state, batch)

        return step

    workdir = tmp_path / "run"
    argv = command(workdir, text, train__init_from=whole.workdir)
    with shared.updating(capture):
        assert call(argv).status == 0
    other = runs.saved(whole.workdir, whole.run)
    with jax.set_mesh(whole.run.mesh):
        fresh = runs.named(whole.run.init_state())
    for name, x in first.items():
        expected = other if name.startswith("params/") else fresh
        assert x.tobytes() == expected[name].tobytes(), name
    assert int(first["step"]) == 0
    # Once it has begun, the other run is not looked at again.
    resumed = copy(workdir, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints/8")
    assert call(command(resumed, text, train__init_from=whole.workdir)).status == 0
    runs.same_run(resumed, workdir, whole.run)


def test_init_from_gives_the_other_runs_held_out_loss_before_the_first_step(
    whole: Whole, shared: Shared, text: Path, tmp_path: Path
):
    """With the gate's state of the other run: the loss follows from weights and state alone."""
    run = prepared(text, train__init_from=whole.workdir)
    with jax.set_mesh(run.mesh):
        warm = loop._initial_params(run, tmp_path / "run")
        with Checkpointer(whole.workdir / "checkpoints", read_only=True) as checkpoints:
            other = checkpoints.restore(run.abstract_state)
        assert other is not None
        state = loop._first_state(run, warm)
        state = dataclasses.replace(state, gate_state=other.state.gate_state)
        totals = [run.eval_step(state, run.put(batch)) for batch in run.eval_batches()]
    row = rows.eval_row(0, totals, run.data, "")
    assert {**row, "step": STEPS} == runs.rows(whole.workdir, "eval")[-1]


def test_init_from_something_that_does_not_fit_is_refused_before_anything_is_written(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    nowhere = tmp_path / "nowhere"
    refused(command(workdir, text, train__init_from=nowhere), f"train.init_from='{nowhere}'")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(whole.workdir / "config.json", empty)
    refused(
        command(workdir, text, train__init_from=empty),
        f"train.init_from='{empty}'", "no checkpoint to start from",
    )  # fmt: skip
    refused(
        command(workdir, text, train__init_from=whole.workdir, moe__d_ff=16),
        f"train.init_from='{whole.workdir}'", "params/", "does not fit this config",
    )  # fmt: skip
    assert not workdir.exists()
