"""The training loop."""

import dataclasses
import json
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from moejax import __version__
from moejax.config import Config, config_differences, default, to_dict
from moejax.data.batches import Prefetcher
from moejax.errors import UserError
from moejax.job import telling
from moejax.train import budget, compile_cache, probe, rows, setup
from moejax.train.checkpoint import Checkpointer, restore_subtree
from moejax.train.console import Console
from moejax.train.lock import WorkdirLock
from moejax.train.metrics import MetricsLog
from moejax.train.processes import from_first, is_first
from moejax.train.setup import Run
from moejax.train.signals import Stop, stopping
from moejax.train.state import TrainState, count_parameters

DONE, FAILED, PREEMPTED = 0, 1, 75

OUTPUT = "log.txt"
"""A file of this name, into which what the run says is sent, may be in the workdir before it."""


def run(config: Config, workdir: str, source: str = "", overrides: tuple[str, ...] = ()) -> int:
    """Trains until ``train.steps``, from the workdir's last good checkpoint if it has one.

    Returns the exit status: 0 done, 75 stopped by a signal after saving, 1 diverged.

    Raises:
      UserError: a mistake in the config or the workdir, before anything is written.
      Stopped: a signal came before there was anything to save.
    """
    with stopping() as stop:
        return _run(config, workdir, source, overrides, stop)


def _run(config: Config, workdir: str, source: str, overrides: tuple[str, ...], stop: Stop) -> int:
    this = setup.prepare(config, workdir)
    folder = Path(workdir)
    check_workdir(folder, config, this.data.fingerprint)
    this.data.train_batch(0)  # data that are too few are refused here,
    this.eval_batches()  # before anything is written
    this.check_gate_data(config.train.steps)
    probe.check(this, folder)
    console, costs = Console(this, folder), budget.count_budget(this)
    console.announce(costs)
    about = {
        "source": source,
        "overrides": list(overrides),
        "flops": {
            "train": dataclasses.asdict(costs.train_flops),
            "eval": dataclasses.asdict(costs.eval_flops),
        },
        "memory": {"state": costs.state_bytes, "activations": costs.activation_bytes},
        "devices": {"kind": this.mesh.devices.flat[0].device_kind, "count": this.mesh.size},
    }
    cached = compile_cache.kept(config.report.compile_cache)
    with cached, jax.set_mesh(this.mesh), closing(console):
        warm = _warm_start(this, folder)
        stop.begin()
        make_workdir(folder)
        with WorkdirLock(folder):
            return _train(this, folder, warm, stop, console, about)


def _train(
    this: Run,
    folder: Path,
    warm: PyTree | None,
    stop: Stop,
    console: Console,
    about: dict[str, Any],
) -> int:
    config = this.config.train
    saves = Checkpointer(folder / "checkpoints", keep=config.keep_checkpoints)
    with saves as checkpoints, telling():
        restored = checkpoints.restore(this.abstract_state)
        start = restored.step if restored else 0
        if restored and start >= config.steps:
            console.already_done(start)
            return DONE
        write_config(this, folder, about)
        log = MetricsLog(
            folder,
            resume_step=start if restored else _fresh(folder),
            tensorboard=this.config.report.tensorboard,
            wandb=this.config.report.wandb,
        )
        state = restored.state if restored else _first_state(this, warm)
        recorder = probe.Recorder(this, folder, resume_step=start if restored else None)
        with log:
            if stop.requested(start):  # before the first step: all there is to save is saved
                console.finish(start, PREEMPTED)
                return PREEMPTED
            console.start(start)
            if not restored:
                recorder.record(0, state)
            try:
                step, status = _loop(this, state, start, checkpoints, log, recorder, stop, console)
            except rows.Divergence as problem:
                console.diverged(problem)
                return FAILED
    console.finish(step, status)
    return status


def _loop(
    this: Run,
    state: TrainState,
    start: int,
    checkpoints: Checkpointer,
    log: MetricsLog,
    recorder: probe.Recorder,
    stop: Stop,
    console: Console,
) -> tuple[int, int]:
    """Update, then the previous step's metrics while the device works; evaluate, save, stop.

    Returns the steps completed and the exit status.
    """
    config = this.config.train
    held_out = [this.put(batch) for batch in this.eval_batches()]
    pending: tuple[int, Any] | None = None
    with Prefetcher(
        lambda step: this.put(this.data.train_batch(step)), start, config.steps
    ) as batches:
        for step, batch in enumerate(batches, start + 1):
            state, metrics = this.train_step(state, batch)
            if step == start + 1:
                jax.block_until_ready(metrics)
                console.compiled(step)
                compile_cache.publish()
            if pending:
                _record(this, *pending, log, console)
            pending = (step, metrics)
            last = step == config.steps
            evaluate_now = last or step % config.eval_every == 0
            save_now = last or step % config.checkpoint_every == 0
            stopping = stop.requested(step) and not last
            if evaluate_now or save_now or stopping:
                _record(this, *pending, log, console)
                pending = None
            if evaluate_now:
                totals = this.evaluate(state, held_out)
                row = rows.eval_row(step, totals, this.data, this.leak)
                log.write(row)
                recorder.record(step, state)
                console.evaluated(row)
            if save_now or stopping:
                rows.check_state(step, state)
                log.flush()
                checkpoints.save(step, state, {"fingerprint": this.data.fingerprint})
            if stopping:
                checkpoints.wait()
                return step, PREEMPTED
    checkpoints.wait()
    return config.steps, DONE


def _record(this: Run, step: int, metrics: Any, log: MetricsLog, console: Console) -> None:
    """Checks a finished step for NaN, and writes and shows it if it is one to log."""
    row = rows.train_row(step, metrics, this.leak)
    config = this.config.train
    if step % config.log_every == 0 or step == config.steps:
        log.write(row)
        log.timing(console.stepped(step, row, time.perf_counter()))


def _warm_start(this: Run, folder: Path) -> PyTree | None:
    """The parameters of ``train.init_from``, for a run that has it and no checkpoint yet.

    Raises:
      UserError: there are none, or they do not fit; before the workdir is made.
    """
    source = this.config.train.init_from
    begun = from_first(bool(Checkpointer(folder / "checkpoints", read_only=True).steps()))
    if not source or begun:
        return None
    try:
        checkpoints = Path(source).expanduser() / "checkpoints"
        return restore_subtree(checkpoints, this.abstract_state.params).state
    except UserError as error:
        raise UserError(f"train.init_from={source!r}: {error}") from error


def _first_state(this: Run, warm: PyTree | None) -> TrainState:
    state = this.init_state()
    return state if warm is None else dataclasses.replace(state, params=warm)


def _fresh(folder: Path) -> int | None:
    """A run killed before its first checkpoint left rows behind: start them again."""
    return 0 if (folder / "metrics.jsonl").exists() else None


def make_workdir(folder: Path) -> None:
    """Makes the folder if it is missing.

    Raises:
      UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--workdir={folder} cannot be written to; name another folder")


def check_workdir(folder: Path, config: Config, fingerprint: str) -> None:
    """Refuses a workdir that belongs to something else, or to this run with other data.

    Raises:
      UserError: naming the field that differs.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a folder")
    path = folder / "config.json"
    if not path.exists():
        if folder.is_dir() and any(n for n in os.listdir(folder) if n[0] != "." and n != OUTPUT):
            raise UserError(f"--workdir={folder} is not empty and holds no run; name a new folder")
        return
    saved = read_config(folder)
    for name, old, new in config_differences(saved["config"], to_dict(config)):
        raise UserError(
            f"{name}={new} but the run in {folder} has {name}={old}; use another --workdir, or "
            "the same value to resume"
        )
    check_text(saved, config, fingerprint, "use another --workdir")


def check_text(saved: dict[str, Any], config: Config, fingerprint: str, remedy: str) -> None:
    """Refuses other tokens than the run's, unless the config names other data."""
    if to_dict(config)["data"] == saved["config"]["data"] and fingerprint != saved["fingerprint"]:
        own = f"data.path={config.data.path!r}" if "path" in config.data else config.task.name
        raise UserError(
            f"the tokens of {own} are not those the run began with; restore the old files or "
            f"{remedy}"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The workdir's config.json.

    Raises:
      UserError: there is none, or it is not what a run writes.
    """
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is {folder} the workdir of a run?") from None
    except ValueError as error:  # also bytes that are no text
        raise UserError(
            f"{path} is not valid JSON ({error}); restore it or use another --workdir"
        ) from error
    known = isinstance(saved, dict) and {"config", "fingerprint", "baselines"} <= saved.keys()
    if not known or not isinstance(saved["config"], dict):
        raise UserError(f"{path} was not written by `moejax train`; use another --workdir")
    return saved


def write_config(this: Run, folder: Path, about: dict[str, Any]) -> None:
    """Writes config.json, in one rename; keeps what the run's first start measured.

    ``about``: where the config is from, and what a token costs.
    """
    if not is_first():
        return
    path = folder / "config.json"
    known = read_config(folder) if path.exists() else {}
    data = this.data
    content = {
        # How these processes found each other is no part of the run: one alone may evaluate it.
        "config": {**to_dict(this.config), "distributed": to_dict(default())["distributed"]},
        **about,
        "version": __version__,
        "corpus": data.name,
        "fingerprint": data.fingerprint,
        **data.about(),
        "units": this.task.units._asdict(),
        "baselines": known.get("baselines") or data.baselines(),
        "parameters": {
            "total": count_parameters(this.abstract_state.params),
            "active": budget.active_parameters(this),
        },
        "visibility": this.leak,
    }
    temporary = folder / ".config.json.tmp"  # hidden: alone, it does not make a folder a run's
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
