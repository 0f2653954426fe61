"""The training loop."""

import dataclasses
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from moejax.config import Config, saved, settings
from moejax.config.saved import CHECKPOINTS, METRICS
from moejax.data.prefetch import prefetch
from moejax.errors import UserError
from moejax.job import telling
from moejax.train import compile_cache, setup
from moejax.train.checkpoint.checkpointer import Checkpointer, restore_subtree
from moejax.train.cost import budget
from moejax.train.metrics import mirrors, rows
from moejax.train.metrics.console import Console
from moejax.train.metrics.log import MetricsLog
from moejax.train.probe import recorder as probe
from moejax.train.processes import from_first, is_first
from moejax.train.setup import Run
from moejax.train.signals import Stop, stopping
from moejax.train.state import TrainState
from moejax.train.workdir.life import Life
from moejax.train.workdir.lock import WorkdirLock
from moejax.train.workdir.origin import origin
from moejax.train.workdir.run_folder import (
    as_begun,
    check_identity,
    check_workdir,
    make_workdir,
    set_aside,
)

DONE, FAILED, PREEMPTED = 0, 1, 75


def run(
    config: Config,
    workdir: str,
    source: str = "",
    overrides: tuple[str, ...] = (),
    restart: bool = False,
) -> int:
    """Trains until ``train.steps``, from the workdir's last good checkpoint if it has one.

    ``restart``: at step 0, although checkpoints that the run has saved are gone. Returns the exit
    status: 0 done, 75 stopped by a signal after saving, 1 diverged.

    Raises:
      UserError: a mistake in the config or the workdir, before anything is written.
      Stopped: a signal came before there was anything to save.
    """
    with stopping() as stop:
        return _run(config, workdir, source, overrides, restart, stop)


def _run(
    config: Config,
    workdir: str,
    source: str,
    overrides: tuple[str, ...],
    restart: bool,
    stop: Stop,
) -> int:
    folder = Path(workdir)
    config = as_begun(folder, config)
    this = setup.prepare(config, workdir)
    mirrors.check(config.report.tensorboard, config.report.wandb)
    found = check_workdir(folder, config, this.data.fingerprint, restart)
    budget.check_sizes(this)
    this.data.train_batch(0)  # data that are too few are refused here,
    this.eval_batches()  # before anything is written
    this.check_gate_data(config.train.steps)
    costs = budget.checked_budget(this)
    probe.check(this, folder, found.eval_rows)
    console = Console(this, folder)
    console.announce(costs)
    about = {
        "source": source,
        "overrides": list(overrides),
        **origin(),
        "flops": {
            "train": dataclasses.asdict(costs.train_flops),
            "eval": dataclasses.asdict(costs.eval_flops),
        },
        "memory": {"state": costs.state_bytes, "activations": costs.activation_bytes},
        "environment": settings.environment(),
        "devices": {"kind": this.mesh.devices.flat[0].device_kind, "count": this.mesh.size},
    }
    cached = compile_cache.kept(config.report.compile_cache)
    with cached, jax.set_mesh(this.mesh), closing(console):
        warm = _warm_start(this, folder)
        stop.begin()
        make_workdir(folder)
        with WorkdirLock(folder):
            return _train(
                this, folder, warm, stop, console, Life(this, folder, found, about, restart)
            )


def _train(
    this: Run,
    folder: Path,
    warm: PyTree | None,
    stop: Stop,
    console: Console,
    life: Life,
) -> int:
    config = this.config.train
    saves = Checkpointer(folder / CHECKPOINTS, keep=config.keep_checkpoints)
    with saves as checkpoints, telling():
        restored = checkpoints.restore(this.abstract_state)
        start = restored.step if restored else 0
        if restored and start >= config.steps:
            if life.found.rebuilt and is_first():
                saved.write_config(folder, life.found.config_json)
            console.already_done(start)
            return DONE
        if life.restart:
            set_aside(folder)
        meta = restored.meta if restored else {}
        if not restored:  # first of all files: without it, the folder would be no run's
            life.begin(start, [], meta)
        log = MetricsLog(
            folder,
            resume_step=start if restored else _fresh(folder),
            tensorboard=this.config.report.tensorboard,
            wandb=this.config.report.wandb,
            counts=meta.get("logs"),
        )
        if restored:
            life.begin(start, log.gaps, meta)
            life.saved()
        state = restored.state if restored else _first_state(this, warm)
        recorder = probe.Recorder(
            this, folder, start if restored else None, life.found.eval_rows if restored else None
        )
        with log:
            if stop.requested(start):  # before the first step: all there is to save is saved
                console.finish(start, PREEMPTED)
                return PREEMPTED
            console.start(start, life.found.config_json.get("config"))
            if not restored:
                recorder.record(0, state)
            try:
                step, status = _loop(
                    this, state, start, checkpoints, log, recorder, stop, console, life
                )
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
    life: Life,
) -> tuple[int, int]:
    """Update, then the previous step's metrics while the device works; evaluate, save, stop.

    Returns the steps completed and the exit status.
    """
    config = this.config.train
    held_out = [this.put(batch) for batch in this.eval_batches()]
    pending: tuple[int, Any] | None = None
    with prefetch(
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
                checkpoints.wait()
                life.saved()  # the one before
                checkpoints.save(step, state, life.meta(step, log))
            elif checkpoints.just_committed():
                life.saved()
            if stopping:
                checkpoints.wait()
                life.saved()
                return step, PREEMPTED
    checkpoints.wait()
    life.saved()
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
    begun = from_first(bool(Checkpointer(folder / CHECKPOINTS, read_only=True).steps()))
    if not source or begun:
        return None
    try:
        other = Path(os.path.expanduser(source))
        check_identity(other, saved.read_config(other))
        return restore_subtree(other / CHECKPOINTS, this.abstract_state.params).state
    except UserError as error:
        raise UserError(f"train.init_from={source!r}: {error}") from error


def _first_state(this: Run, warm: PyTree | None) -> TrainState:
    state = this.init_state()
    return state if warm is None else dataclasses.replace(state, params=warm)


def _fresh(folder: Path) -> int | None:
    """A run killed before its first checkpoint left rows behind: start them again."""
    return 0 if (folder / METRICS).exists() else None
