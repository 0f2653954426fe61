"""The numbers of the loop: the plain loop, compiled once, on any mesh, in any number of parts."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax.record.files import read_rows
from moejax.tasks.task import Totals
from moejax.train.metrics import rows
from moejax.types import MoEStats
from tests.train import runs
from tests.train.runs import SETTINGS, STEPS, call, command, copy
from tests.train.sharing import Compilations, Shared, Whole, prepared

NAN, INF = np.float32("nan"), np.float32("inf")
TOKENS = SETTINGS["train.batch_size"] * SETTINGS["train.seq_len"]


@pytest.mark.slow
def test_the_run_is_the_plain_loop_over_the_corpus(whole: Whole, text: Path):
    """Losses, learning rates and the final state, bit for bit, of a loop of ten lines."""
    run = whole.run
    source = run.data
    seen: dict[tuple[int, str], float] = {}
    with jax.set_mesh(run.mesh):
        state = run.init_state()
        for step in range(1, STEPS + 1):
            state, metrics = run.train_step(state, run.put(source.train_batch(step - 1)))
            totals = metrics["totals"]
            seen[step, "train"] = float(totals.loss) / TOKENS
            if step in (7, 8):
                held_out = [run.eval_step(state, run.put(b)) for b in run.eval_batches()]
                tokens = sum(int(t.items) for t in held_out)
                seen[step, "eval"] = sum(float(t.loss) for t in held_out) / tokens
    found = runs.rows(whole.workdir)
    assert [(row["step"], row["split"]) for row in found] == [
        (3, "train"), (6, "train"), (7, "eval"), (8, "train"), (8, "eval"),
    ]  # fmt: skip
    for row in found:
        # The evaluation adds up its batches in float32.
        exact = 0 if row["split"] == "train" else 1e-6
        assert row["loss"] == pytest.approx(seen[row["step"], row["split"]], rel=exact, abs=0)
        if row["split"] == "train":
            assert row["learning_rate"] == np.float32(0.01 * row["step"] / 10)
    saved = runs.saved(whole.workdir, run)
    assert int(saved["step"]) == STEPS
    assert any(name.startswith("gate_state/") and x.any() for name, x in saved.items())
    assert runs.same_bits(saved, runs.named(state))


def test_the_corpus_is_shorter_than_the_run_which_goes_through_it_again(whole: Whole):
    per_epoch = runs.text_of(whole.run).train.num_rows
    taken = STEPS * SETTINGS["train.batch_size"]
    assert 2 * per_epoch < taken and per_epoch % SETTINGS["train.batch_size"]
    assert sum(b["valid"].sum() for b in whole.run.eval_batches()) < 12 * 16  # and padded
    assert [row["step"] for row in runs.rows(whole.workdir, "train")][-1] == STEPS


def test_the_step_compiles_once_and_later_nothing_compiles(
    whole: Whole, shared: Shared, text: Path, tmp_path: Path
):
    assert [step for step, name in whole.compilations if name == "train_step"] == [1]
    # By step 3 the run has trained, logged and saved; step 7 is the first to evaluate.
    assert [found for found in whole.compilations if found[0] > 3] == [(7, "eval_step")]
    # The first resumption compiles where the programs of earlier test modules have been freed.
    assert call(command(copy(whole.moments / "4", tmp_path / "first"), text)).status == 0
    workdir = copy(whole.moments / "4", tmp_path / "run")
    with Compilations() as again, shared.steps(before=again.at):
        assert call(command(workdir, text)).status == 0
    assert not {"train_step", "eval_step", "_init"} & {name for _, name in again.found}


def test_no_step_moves_anything_between_host_and_device(whole: Whole):
    run = whole.run
    double = jax.jit(lambda x: 2 * x)
    with jax.set_mesh(run.mesh):
        state, batch = run.init_state(), run.put(run.data.train_batch(0))
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, metrics = run.train_step(state, batch)
            totals = run.eval_step(state, batch)
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
                double(np.ones(2))  # the guard sees a transfer when there is one
    assert math.isfinite(metrics["total_loss"]) and math.isfinite(totals.loss)


def accumulated(text: Path, accum: int, group: str, batch_size: int) -> dict[str, Any]:
    """The metrics of one update of the first batch, in ``accum`` parts, and the gradient as Adam's
    first moment has it."""
    changes = {"moe.group": group, "train.grad_accum": accum, "train.batch_size": batch_size}
    run = prepared(text, **changes)
    with jax.set_mesh(run.mesh):
        state, metrics = run.train_step(run.init_state(), run.put(run.data.train_batch(0)))
    moments = {name: x for name, x in runs.named(state).items() if "/mu/" in name}
    return {**jax.device_get(metrics), "gradient": moments}


def same_in_parts(text: Path, group: str, batch_size: int, *accums: int) -> None:
    whole = accumulated(text, 1, group, batch_size)
    assert whole["totals"].stats.dropped_E.sum() > 0
    for accum in accums:
        parts = accumulated(text, accum, group, batch_size)
        # Sums of the same float32 numbers in another order.
        assert parts["total_loss"] == pytest.approx(whole["total_loss"], rel=1e-6)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert parts["gradient"].keys() == whole["gradient"].keys() and len(parts["gradient"]) > 10
        for name, x in parts["gradient"].items():
            largest = np.abs(whole["gradient"][name]).max()
            assert largest > 0
            np.testing.assert_allclose(x, whole["gradient"][name], rtol=0, atol=1e-5 * largest)
        for name in ("loss", "auxiliary", "mean_square"):
            a, b = getattr(parts["totals"], name), getattr(whole["totals"], name)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)
        assert parts["totals"].items == whole["totals"].items
        assert parts["totals"].metrics == whole["totals"].metrics
        for name in ("tokens", "load_E", "dropped_E", "dropped_L", "unserved_tokens"):
            a, b = (getattr(x["totals"].stats, name) for x in (parts, whole))
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.slow
def test_a_batch_in_four_parts_gives_the_same_loss_counts_and_drops(shared: Shared, text: Path):
    same_in_parts(text, "sequence", 8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["sequence", "2"])
def test_a_batch_in_any_number_of_parts_gives_the_same_loss_counts_and_drops(
    group: str, shared: Shared, text: Path
):
    same_in_parts(text, group, 16, 2, 4)


# ---------------------------------------------------------------- another mesh


@pytest.mark.slow
@pytest.mark.parametrize("data, expert", [(1, 1), (2, 1)])
def test_a_run_resumed_on_another_mesh_has_the_same_data_and_losses(
    data: int, expert: int, whole: Whole, shared: Shared, text: Path, tmp_path: Path
):
    taken: list[Any] = []

    def recording(update: Any) -> Any:
        def step(state: Any, batch: Any) -> Any:
            taken.append(jax.device_get(batch))
            return update(state, batch)

        return step

    workdir = copy(whole.moments / "4", tmp_path / "run")
    with shared.updating(recording):
        ended = call(command(workdir, text, mesh__data=data, mesh__expert=expert))
    assert (ended.status, ended.err) == (0, "")
    assert f"data={data} x fsdp=1 x expert={expert} x tensor=1" in ended.out
    assert f"resuming {workdir} at step 3" in ended.out
    source = whole.run.data
    assert len(taken) == STEPS - 3
    for step, batch in enumerate(taken, start=3):
        for name, x in source.train_batch(step).items():
            np.testing.assert_array_equal(batch[name], x)
    timings = read_rows(workdir / "timings.jsonl")
    starts = {row["step"]: row["from_step"] for row in timings}
    assert starts == {step: 0 if step <= 3 else 3 for step in starts} and len(starts) > 1
    found, expected = runs.rows(workdir), runs.rows(whole.workdir)
    assert [(r["step"], r["split"]) for r in found] == [(r["step"], r["split"]) for r in expected]
    for row, other in zip(found, expected, strict=True):
        # Sums over devices in another order, over five steps.
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)


# ---------------------------------------------------------------- values that are not finite


def totals_of(**changes: Any) -> Totals:
    fine: dict[str, Any] = {
        "items": np.int32(1),
        "loss": np.float32(1),
        "log_z_square": np.float32(1),
        "metrics": {"accuracy": np.int32(0)},
        "auxiliary": {"z": np.float32(1)},
        "means": {},
        "mean_square": np.ones(3, np.float32),
        "stats": None,
    }
    return Totals(**{**fine, **changes})


def entropies(*layers: float | np.floating) -> MoEStats:
    """Statistics of MoE layers, of which only the routers' entropies are looked at."""
    counts = [f.name for f in dataclasses.fields(MoEStats) if f.default is dataclasses.MISSING]
    fields = {name: np.zeros(len(layers)) for name in counts}
    return MoEStats(**{**fields, "entropy": np.asarray(layers)})


@pytest.mark.parametrize(
    "totals, others, where",
    [
        (totals_of(loss=NAN, mean_square=np.array([1, INF, NAN])), (1, 1), "layer 1 "),
        (totals_of(stats=entropies(1, NAN, NAN)), (1, 1), "the router of MoE layer 1 "),
        (totals_of(loss=NAN, stats=entropies(1, 1)), (1, 1), "every layer's output is finite"),
        (totals_of(loss=NAN), (NAN, NAN), "every layer's output is finite but the loss"),
        (totals_of(), (INF, 1), "every layer's output is finite but the loss is not"),
        (totals_of(), (1, INF), "the loss is finite but its gradient is not"),
    ],
)
def test_a_value_that_is_not_finite_is_named_with_its_step(
    totals: Totals, others: tuple[float, float], where: str
):
    with pytest.raises(rows.Divergence, match=f"^step 7: .*{re.escape(where)}"):
        rows.check_finite(7, totals, *others)
    rows.check_finite(7, totals_of(), 1.0, 1.0)


@pytest.mark.slow
def test_divergence_ends_with_one_line_and_exit_status_1(
    shared: Shared, text: Path, tmp_path: Path
):
    absurd = {"optim.learning_rate": 1e38, "train.checkpoint_every": 1}
    ended = call(command(tmp_path / "run", text, **absurd))
    assert ended.status == 1 and ended.err.count("\n") == 1
    assert "moejax: diverged at step " in ended.err and "optim.learning_rate" in ended.err
    run = prepared(text, **absurd)
    for step in runs.steps(tmp_path / "run"):
        arrays = runs.saved(tmp_path / "run", run, step)
        assert all(np.isfinite(x).all() for x in arrays.values())
