"""Fields that change when a run resumes, and runs of older versions."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import FIELDS, MAY_CHANGE, flatten, from_dict, load, to_dict
from moejax.config.versions import SCHEMA
from moejax.errors import UserError
from moejax.train.metrics import console
from moejax.train.optim import make_optimizer, make_schedule
from tests.train import runs
from tests.train.runs import PAGE, ROOT, call, command, refused
from tests.train.sharing import Whole

OLD = ROOT / "tests/train/data"
WHOLE_TEXT = {"data.bos": "none", "data.duplicates": "keep"}
VERSIONS: dict[str, dict[str, Any]] = {
    "0.1.0": {"data.split": "documents", "moe.gate.name": "mixtral", **WHOLE_TEXT},
    "schema-1": WHOLE_TEXT,
}
"""Workdirs that older versions wrote, and the fields whose defaults were different then."""


def test_exactly_the_listed_fields_may_change():
    sections = ("mesh.", "distributed.", "report.")
    assert {name for name in MAY_CHANGE if not name.startswith(sections)} == {
        "train.steps", "train.log_every", "train.eval_every", "train.eval_rows",
        "train.checkpoint_every", "train.keep_checkpoints",
        "optim.learning_rate", "optim.weight_decay", "optim.clip_norm",
        "optim.schedule", "optim.decay_steps", "optim.decay_fraction", "optim.final_fraction",
    }  # fmt: skip
    assert {name for name in FIELDS if name.startswith(sections)} <= {*MAY_CHANGE}


# ---------------------------------------------------------------- the schedule


def optim(*overrides: str) -> Any:
    return load(PAGE, [f"optim.{override}" for override in overrides]).config.optim


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_decay_steps_keep_a_schedule_when_the_steps_are_raised(name: str):
    given = ("learning_rate=0.01", "warmup_steps=5", f"schedule={name}")
    short = make_schedule(optim(*given), 20)
    longer = make_schedule(optim(*given, "decay_steps=20"), 60)
    stretched = make_schedule(optim(*given), 60)
    as_before, held, raised = (np.asarray(of(jnp.arange(60))) for of in (short, longer, stretched))
    np.testing.assert_array_equal(held, as_before)
    np.testing.assert_allclose(held[19:], 0.001, rtol=1e-6)
    assert raised[20] > 5 * held[20], "what this is about"


def test_decay_steps_within_the_warm_up_are_refused():
    with pytest.raises(UserError, match="optim.decay_steps=5 must be above optim.warmup_steps=50"):
        make_optimizer(optim("decay_steps=5", "warmup_steps=50"), 100, {})


def run_of(steps: int, *overrides: str) -> Any:
    config = load(PAGE, [f"train.steps={steps}", "optim.warmup_steps=2", *overrides]).config
    return SimpleNamespace(config=config, schedule=make_schedule(config.optim, steps))


def test_a_rising_learning_rate_is_reported_with_both_values_and_a_remedy():
    before = to_dict(run_of(20, "optim.learning_rate=0.01").config)
    raised = run_of(400, "optim.learning_rate=0.01")
    said = console.learning_rate_rise(raised, 20, before)
    assert "at step 21, from 0.001 to 0.0099" in said and "train.steps from 20 to 400" in said
    assert "optim.decay_steps=20 keeps" in said and "\n" not in said
    kept = run_of(400, "optim.learning_rate=0.01", "optim.decay_steps=20")
    assert console.learning_rate_rise(kept, 20, before) == ""
    assert console.learning_rate_rise(run_of(20, "optim.learning_rate=0.01"), 20, before) == ""
    lower = run_of(20, "optim.learning_rate=0.005")
    assert console.learning_rate_rise(lower, 10, before) == ""
    higher = run_of(20, "optim.learning_rate=0.02")
    assert "optim.learning_rate from 0.01 to 0.02" in console.learning_rate_rise(higher, 10, before)
    constant = to_dict(run_of(20, "optim.schedule=constant").config)
    assert console.learning_rate_rise(run_of(400, "optim.schedule=constant"), 20, constant) == ""


def test_a_finished_run_names_the_effect_of_raising_its_steps():
    advice = console._more_steps(run_of(20, "optim.learning_rate=0.01"), 20)
    assert "goes up again" in advice and "optim.decay_steps=20 keeps it at 0.001" in advice
    assert console._more_steps(run_of(20, "optim.schedule=constant"), 20) == ""
    assert console._more_steps(run_of(20, "optim.decay_steps=20"), 20) == ""


def test_the_schedule_line_has_the_present_the_peak_and_the_last_learning_rate():
    run = run_of(100, "optim.learning_rate=0.01", "optim.warmup_steps=10")
    assert console._schedule_line(run, 0) == (
        "cosine over 100 steps: learning rate 0.001 at step 1, 0.01 at step 10, 0.001 at step 100"
    )
    assert "0.01 at step 10" not in console._schedule_line(run, 50)
    held = run_of(300, "optim.learning_rate=0.01", "optim.decay_steps=100")
    assert console._schedule_line(held, 150).endswith("0.001 at step 151, 0.001 at step 300")
    assert console._schedule_line(held, 150).startswith("cosine over 100 steps")


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_the_optimizers_state_does_not_depend_on_the_fields_that_may_change(name: str):
    params = {
        "mlp": {"up_DF": jnp.ones((4, 6)), "scale": jnp.ones(4)},
        "embed_VD": jnp.ones((8, 4)),
    }
    shapes = set()
    for clip, decay, schedule, length in itertools.product(
        (0.0, 1.0), (0.0, 0.1), ("cosine", "wsd", "constant"), (0, 90)
    ):
        given = (
            f"name={name}", f"clip_norm={clip}", f"weight_decay={decay}", f"schedule={schedule}",
            f"decay_steps={length}",
        )  # fmt: skip
        optimizer, _ = make_optimizer(optim(*given), 100, params)
        state = jax.eval_shape(optimizer.init, params)
        leaves = jax.tree.leaves_with_path(state)
        shapes.add(tuple((jax.tree_util.keystr(p), x.shape, str(x.dtype)) for p, x in leaves))
    assert len(shapes) == 1


# ---------------------------------------------------------------- resuming with other values


@pytest.mark.slow
def test_changed_fields_take_effect_and_are_kept_in_the_history(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = runs.copy(whole.moments / "8", tmp_path / "run")  # checkpoints 3 and 6
    changes = {
        "train.steps": 12, "train.log_every": 2, "train.eval_every": 5, "train.eval_rows": 8,
        "optim.learning_rate": 0.02, "optim.weight_decay": 0.0, "optim.clip_norm": 0.0,
        "optim.schedule": "wsd",
    }  # fmt: skip
    ended = call(command(workdir, text, **changes))
    assert ended.status == 0, ended.err
    assert "the learning rate goes up at step 7" in ended.err
    before = runs.config_of(whole.workdir)["config"]
    kept = {entry["field"]: entry for entry in history(workdir)}
    assert kept.keys() == changes.keys()
    for name, value in changes.items():
        entry = kept[name]
        assert (entry["step"], entry["old"], entry["new"]) == (6, flatten(before)[name], value)
        assert entry["version"] and entry["time"]
    train = [row["step"] for row in runs.rows(workdir, "train")]
    assert train == [3, 6, 8, 10, 12]
    assert [row["step"] for row in runs.rows(workdir, "eval")] == [10, 12]
    again = call(command(workdir, text, **{**changes, "train.steps": 13}))
    assert again.status == 0 and len(history(workdir)) == len(changes) + 1
    refused(command(workdir, text, **changes, optim__b2=0.9), "optim.b2=0.9", "--workdir")
    report = call(["report", str(workdir)])
    assert report.status == 0
    page = (workdir / "report.html").read_text()
    assert "step 6: optim.learning_rate from" in page


def history(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "config.json").read_text())["history"]


# ---------------------------------------------------------------- runs of older versions


@pytest.fixture(params=VERSIONS)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stored folder of a version, whose text and workdir are copied to the current folder."""
    stored = OLD / request.param
    shutil.copytree(OLD / "0.1.0" / "text", tmp_path / "text")
    shutil.copytree(stored / "workdir", tmp_path / "workdir")
    monkeypatch.chdir(tmp_path)
    return stored


def old_command(stored: Path) -> list[str]:
    """The command in the README beside the run."""
    text = (stored / "README.md").read_text()
    words = text.split("    moejax train ")[1].split("\n\n")[0].split()
    return ["train", *(word.replace("=configs/", f"={ROOT}/configs/") for word in words)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_config_of_an_older_version_reads_as_its_command_does_today(old: Path):
    overrides = [word for word in old_command(old) if word.startswith("--config.")]
    now = load(f"{ROOT}/configs/lm.py:size=debug,experts=4", overrides).config
    then = load("workdir").config
    assert flatten(then) == {**flatten(now), **VERSIONS[old.name]}
    assert from_dict(to_dict(then)) == then


@pytest.mark.slow
def test_a_run_of_an_older_version_is_evaluated_resumed_and_reported(old: Path):
    expected, workdir = rows_of(old / "uninterrupted.jsonl"), Path("workdir")
    before = json.loads((workdir / "config.json").read_text())
    ended = call(["eval", "--workdir=workdir"])
    assert ended.status == 0, ended.err
    (then,) = [row for row in rows_of(workdir / "metrics.jsonl") if row["split"] == "eval"]
    assert json.loads(ended.out)["loss"] == pytest.approx(then["loss"], rel=1e-5)
    assert call(["report", "workdir"]).status == 0
    ended = call(old_command(old))
    assert ended.status == 0 and "resuming workdir at step 6" in ended.out, ended.err
    rows = rows_of(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), row["step"]
    content = json.loads((workdir / "config.json").read_text())
    assert content["schema"] == SCHEMA and content["id"] == before.get("id", content["id"])
    assert call(["report", "workdir"]).status == 0
