"""A run that is stopped, killed or damaged, and then started again by the same command, ends with
the bytes of a run that was left alone."""

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

from moejax.config import saved
from tests.train import runs
from tests.train.disturb import end, start, until
from tests.train.runs import PREEMPTED, STEPS, call, command, copy
from tests.train.sharing import MOMENTS, Shared, Whole


@dataclasses.dataclass(frozen=True)
class Child:
    process: Popen[str]
    workdir: Path


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Iterator[Child]:
    """Killed while it saves; starts before this process compiles, so that both cores have work."""
    folder = tmp_path_factory.mktemp("saving")
    argv = command(folder / "run", text)
    yield from running(start("save", 6, "SIGKILL", argv), folder / "run")


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory, saving: Child, text: Path) -> Iterator[Child]:
    """Resumes after the kill, in a copy of the workdir, and waits before step 5."""
    saving.process.wait(timeout=300)
    workdir = tmp_path_factory.mktemp("waiting") / "run"
    shutil.copytree(saving.workdir, workdir)
    yield from running(start("step", 5, "wait", command(workdir, text)), workdir)


def running(process: Popen[str], workdir: Path) -> Iterator[Child]:
    yield Child(process, workdir)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def whole(saving: Child, whole: Whole) -> Whole:
    return whole


# ---------------------------------------------------------------- kill -9


@pytest.mark.slow
@pytest.mark.quick(2)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_between_steps_resumes_and_ends_bit_equal(
    moment: int | str, whole: Whole, text: Path, tmp_path: Path
):
    workdir = copy(whole.moments / str(moment), tmp_path / "run")
    assert runs.steps(workdir) == MOMENTS[moment]
    ended = call(command(workdir, text))
    assert (ended.status, ended.err) == (0, "")
    newest = max(MOMENTS[moment], default=0)
    if newest == STEPS:
        assert f"is complete at step {STEPS}" in ended.out
    else:
        assert (f"resuming {workdir} at step {newest}" in ended.out) == (newest > 0)
    runs.same_run(workdir, whole.workdir, whole.run)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_row_resumes_and_ends_bit_equal(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = copy(whole.moments / "7", tmp_path / "run")
    for name in ("metrics.jsonl", "timings.jsonl"):
        with open(workdir / name, "a") as file:
            file.write('{"step": 8, "split": "tra')
    assert call(command(workdir, text)).status == 0
    runs.same_run(workdir, whole.workdir, whole.run)


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".config.json.tmp"]])
def test_a_run_killed_before_writing_its_config_starts_again(
    left: list[str], whole: Whole, text: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in left:
        (workdir / name).write_text("{")
    assert call(command(workdir, text)).status == 0
    runs.same_run(workdir, whole.workdir, whole.run)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_kill_9_of_a_process_that_is_saving_leaves_the_checkpoint_before(
    saving: Child, whole: Whole, text: Path, tmp_path: Path
):
    ended = end(saving.process)
    assert ended.status == -signal.SIGKILL, ended.err
    workdir = copy(saving.workdir, tmp_path / "run")
    assert runs.steps(workdir) == [3]
    assert any(path.name.startswith("6.") for path in (workdir / "checkpoints").iterdir()), (
        "killed too early or too late"
    )
    assert [row["step"] for row in runs.rows(workdir)] == [3, 6]  # the last is to be cut off
    ended = call(command(workdir, text))
    assert ended.status == 0 and f"resuming {workdir} at step 3" in ended.out
    runs.same_run(workdir, whole.workdir, whole.run)


# ---------------------------------------------------------------- SIGTERM and Ctrl-C


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_live_run_keeps_its_workdir_and_sigterm_makes_it_save_and_exit_75(
    waiting: Child, whole: Whole, text: Path
):
    process, workdir = waiting.process, waiting.workdir
    said = until("waiting\n", process)
    assert f"resuming {workdir} at step 3\n" in said
    refused = call(command(workdir, text))
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert f"is in use by process {process.pid} " in refused.err

    process.send_signal(signal.SIGTERM)
    ended = end(process, "\n")
    assert ended.status == PREEMPTED
    assert "moejax: stopping after this step and saving; once more to abort" in ended.err
    assert ended.out.endswith("stopped and saved at step 5; the same command resumes\n")
    assert runs.steps(workdir) == [3, 5]
    ended = call(command(workdir, text))
    assert ended.status == 0 and f"resuming {workdir} at step 5" in ended.out
    runs.same_run(workdir, whole.workdir, whole.run)


@pytest.mark.slow
def test_a_run_stopped_repeatedly_resumes_and_ends_bit_equal(
    shared: Shared, whole: Whole, text: Path, tmp_path: Path
):
    """At the first step, at a step that is logged and saved anyway, between, and at the last."""
    workdir = tmp_path / "run"
    for step in (1, 3, 5, 8):
        number = signal.SIGINT if step % 2 else signal.SIGTERM

        def interrupt(now: int, step: int = step, number: signal.Signals = number) -> None:
            if now == step:
                signal.raise_signal(number)

        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with shared.steps(before=interrupt):
            ended = call(command(workdir, text))
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert max(runs.steps(workdir)) == step
        if step < STEPS:
            assert ended.status == PREEMPTED
            assert f"stopped and saved at step {step};" in ended.out
    assert ended.status == 0
    runs.same_run(workdir, whole.workdir, whole.run)


@pytest.mark.parametrize("moment", [None, "7"])
def test_a_run_stopped_before_its_first_step_exits_75_without_a_step(
    moment: str | None, whole: Whole, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While a checkpoint is restored or the corpus counted, there is nothing to wait for."""
    workdir, write_config = tmp_path / "run", saved.write_config
    if moment:
        copy(whole.moments / moment, workdir)
    before = runs.steps(workdir)

    def interrupted(*args: Any) -> None:
        write_config(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_config", interrupted)
        ended = call(command(workdir, text))
    assert ended.status == PREEMPTED and "compiling" not in ended.out
    said = f"and saved at step {before[-1]}" if before else "at step 0"
    assert ended.out.endswith(f"stopped {said}; the same command resumes\n")
    assert runs.steps(workdir) == before
    assert call(command(workdir, text)).status == 0
    runs.same_run(workdir, whole.workdir, whole.run)


# ---------------------------------------------------------------- damaged checkpoints


def largest_array_file(checkpoint: Path) -> Path:
    found = [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


def damage(checkpoint: Path, how: str) -> None:
    if how == "empty":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        return
    file = largest_array_file(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data if how == "bit" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["bit", "truncated", "empty"])
def test_a_corrupt_newest_checkpoint_is_moved_aside_and_the_run_ends_bit_equal(
    how: str, whole: Whole, text: Path, tmp_path: Path
):
    workdir = copy(whole.workdir, tmp_path / "run")
    damage(workdir / "checkpoints/8", how)
    ended = call(command(workdir, text))
    assert ended.status == 0 and f"resuming {workdir} at step 6" in ended.out
    assert ended.err.count("\n") == 1 and "checkpoint 8 " in ended.err
    assert "is damaged" in ended.err
    assert (workdir / "checkpoints_bad/8-0").is_dir()
    runs.same_run(workdir, whole.workdir, whole.run)


def test_a_run_with_every_checkpoint_corrupt_does_not_start(
    whole: Whole, text: Path, tmp_path: Path
):
    workdir = copy(whole.workdir, tmp_path / "run")
    damage(workdir / "checkpoints/6", "bit")
    damage(workdir / "checkpoints/8", "truncated")
    kept = {name: x for name, x in runs.files(workdir).items() if "checkpoints" not in name}
    for reports in (2, 0):  # the second time they have been put aside already
        ended = call(command(workdir, text))
        *damaged, error = ended.err.splitlines()
        assert ended.status == 2 and len(damaged) == reports
        assert error.startswith("moejax: error: ") and "no usable checkpoint" in error
        assert "compiling" not in ended.out
        left = runs.files(workdir)
        assert {name: x for name, x in left.items() if "checkpoints" not in name} == kept


# ---------------------------------------------------------------- values that are not finite


def poisoned(state, layer: int):
    """The state with a NaN in one layer's weights."""

    def poison(path, x):
        name = path[-1].key
        return x.at[layer].set(np.nan) if "periods" in map(key, path) and name == "up_EDF" else x

    def key(part) -> str:
        return str(getattr(part, "key", ""))

    import jax

    params = jax.tree_util.tree_map_with_path(poison, state.params)
    return dataclasses.replace(state, params=params)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "poisoned_after, found_at, where, left",
    [
        (1, 2, "the output of layer 1 (counting from 0)", []),
        (5, 6, "the output of layer 1 (counting from 0)", [3]),  # a checkpoint is due at 6
        (6, 6, "after the update params/", [3]),  # the loss at 6 is that before the update
        (8, 8, "the output of layer 1 (counting from 0)", [3, 6]),  # found by the last evaluation
    ],
)
def test_a_nan_stops_the_run_before_it_is_saved_and_resuming_without_it_ends_bit_equal(
    poisoned_after: int,
    found_at: int,
    where: str,
    left: list[int],
    shared: Shared,
    whole: Whole,
    text: Path,
    tmp_path: Path,
):
    def after(step: int, state):
        return poisoned(state, layer=1) if step == poisoned_after else state

    workdir = tmp_path / "run"
    with shared.steps(after=after):
        ended = call(command(workdir, text))
    assert ended.status == 1
    assert ended.err.count("\n") == 1
    assert f"diverged at step {found_at}: {where}" in ended.err
    assert runs.steps(workdir) == left
    for step in left:
        arrays = runs.saved(workdir, whole.run, step)
        assert all(np.isfinite(x).all() for x in arrays.values())
    assert all(np.isfinite(row["loss"]) for row in runs.rows(workdir))
    assert call(command(workdir, text)).status == 0
    runs.same_run(workdir, whole.workdir, whole.run)
