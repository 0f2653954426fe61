"""The training loop."""

import dataclasses
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from moejax.config import Config, saved
from moejax.config.saved import CHECKPOINTS, METRICS
from moejax.data.prefetch import prefetch
from moejax.data.source import Positioned
from moejax.errors import UserError
from moejax.job import report_failure
from moejax.train import compile_cache, setup
from moejax.train.checkpoint.checkpointer import Checkpointer, restore_subtree
from moejax.train.checkpoint.restore import Restored
from moejax.train.cost import budget
from moejax.train.metrics import mirrors, rows
from moejax.train.metrics.console import Console
from moejax.train.metrics.log import MetricsLog
from moejax.train.probe import recorder as probe
from moejax.train.processes import from_first
from moejax.train.setup import Run
from moejax.train.signals import Stop, stopping
from moejax.train.state import TrainState
from moejax.train.workdir.contents import (
    as_started,
    check_identity,
    check_workdir,
    make_workdir,
    set_aside,
)
from moejax.train.workdir.lock import WorkdirLock
from moejax.train.workdir.run_record import RunRecord, description

DONE, FAILED, PREEMPTED = 0, 1, 75


def run(
    config: Config,
    workdir: str,
    source: str = "",
    overrides: tuple[str, ...] = (),
    restart: bool = False,
) -> int:
    """Trains until ``train.steps``, from the workdir's last good checkpoint if it has one.

    ``restart``: start at step 0, although the run's saved checkpoints are gone. Returns the exit
    status: 0 done, 75 stopped by a signal after saving, 1 diverged.

    Raises:
      UserError: a mistake in the config or the workdir, before anything is written.
      Stopped: a signal came before there was anything to save.
    """
    with stopping() as stop:
        folder = Path(workdir)
        config = as_started(folder, config)
        run = setup.prepare(config, workdir)
        mirrors.check(config.report.tensorboard, config.report.wandb)
        contents = check_workdir(folder, config, run.data.fingerprint, restart)
        budget.check_sizes(run)
        run.data.train_batch(0)  # too little data is refused here,
        run.eval_batches()  # before anything is written
        run.check_gate_data(config.train.steps)
        costs = budget.checked_budget(run)
        probe.check(run, folder, contents.eval_rows)
        console = Console(run, folder)
        console.announce(costs)
        about = description(run, costs, source, overrides)
        record = RunRecord(run, folder, contents, about, restart)
        cache = compile_cache.kept(config.report.compile_cache)
        with cache, jax.set_mesh(run.mesh), closing(console):
            initial_params = _initial_params(run, folder)
            stop.begin()
            make_workdir(folder)
            with WorkdirLock(folder):
                return _train(run, record, console, stop, initial_params)


def _train(
    run: Run, record: RunRecord, console: Console, stop: Stop, initial_params: PyTree | None
) -> int:
    """Restores or initialises the state, trains, and returns the exit status."""
    folder, train = record.folder, run.config.train
    with (
        Checkpointer(folder / CHECKPOINTS, keep=train.keep_checkpoints) as checkpoints,
        report_failure(),
    ):
        restored = checkpoints.restore(run.abstract_state)
        start = restored.step if restored else 0
        if restored and start >= train.steps:
            record.rewrite_config()
            console.already_done(start)
            return DONE
        if restored and isinstance(run.data, Positioned):
            run.data.resume(restored.meta.get("position"))
        if record.restart:
            set_aside(folder)
        log = _open_log(record, restored)
        state = restored.state if restored else _first_state(run, initial_params)
        eval_rows = record.contents.eval_rows if restored else None
        recorder = probe.Recorder(run, folder, start if restored else None, eval_rows)
        outputs = Outputs(run, record, console, log, recorder, checkpoints)
        with log:
            if stop.requested(start):  # before the first step: everything is saved already
                console.stopped(start)
                return PREEMPTED
            console.start(start, record.contents.config_json.get("config"))
            if not restored:
                recorder.record(0, state)
            try:
                step, done = _loop(run, state, start, outputs, stop)
            except rows.Divergence as problem:
                console.diverged(problem)
                return FAILED
    if not done:
        console.stopped(step)
        return PREEMPTED
    console.finished()
    return DONE


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The destinations of a run's results: console, logs, probe and checkpoints."""

    run: Run
    record: RunRecord
    console: Console
    log: MetricsLog
    recorder: probe.Recorder
    checkpoints: Checkpointer

    def trained(self, step: int, metrics: Any) -> None:
        """Checks a finished step for NaN; writes and shows it if it is a step to log."""
        row = rows.train_row(step, metrics, self.run.leak)
        train = self.run.config.train
        if step % train.log_every == 0 or step == train.steps:
            self.log.write(row)
            self.log.timing(self.console.stepped(step, row, time.perf_counter()))

    def evaluated(self, step: int, state: TrainState, totals: Any) -> None:
        """Writes and shows an evaluation, and records the probe."""
        row = rows.eval_row(step, totals, self.run.data, self.run.leak)
        self.log.write(row)
        self.recorder.record(step, state)
        self.console.evaluated(row)

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving a checkpoint, after the one before is committed."""
        rows.check_state(step, state)
        self.log.flush()
        self.wait_for_save()
        self.checkpoints.save(step, state, self.record.checkpoint_meta(step, self.log))

    def note_committed(self) -> None:
        """Notes a checkpoint that has been committed since the last call; does not wait."""
        if self.checkpoints.just_committed():
            self.record.checkpoint_committed()

    def wait_for_save(self) -> None:
        """Blocks until the last checkpoint is committed, and notes it."""
        self.checkpoints.wait()
        self.record.checkpoint_committed()


def _loop(
    run: Run, state: TrainState, start: int, outputs: Outputs, stop: Stop
) -> tuple[int, bool]:
    """Update, then the previous step's metrics while the device works; evaluate, save, stop.

    Returns the number of completed steps, and whether these are all.
    """
    config = run.config.train
    held_out = [run.put(batch) for batch in run.eval_batches()]
    pending: tuple[int, Any] | None = None
    with prefetch(lambda step: run.put(run.data.train_batch(step)), start, config.steps) as batches:
        for step, batch in enumerate(batches, start + 1):
            state, metrics = run.train_step(state, batch)
            if step == start + 1:
                jax.block_until_ready(metrics)
                outputs.console.compiled(step)
                compile_cache.publish()
            if pending:
                outputs.trained(*pending)
            pending = (step, metrics)
            last = step == config.steps
            evaluate_now = last or step % config.eval_every == 0
            save_now = last or step % config.checkpoint_every == 0
            stop_now = stop.requested(step) and not last
            if evaluate_now or save_now or stop_now:
                outputs.trained(*pending)
                pending = None
            if evaluate_now:
                outputs.evaluated(step, state, run.evaluate(state, held_out))
            if save_now or stop_now:
                outputs.save(step, state)
            else:
                outputs.note_committed()
            if stop_now:
                outputs.wait_for_save()
                return step, False
    outputs.wait_for_save()
    return config.steps, True


def _open_log(record: RunRecord, restored: Restored | None) -> MetricsLog:
    """Writes config.json for this start, and opens the logs at the restored step."""
    folder, report = record.folder, record.run.config.report
    meta = restored.meta if restored else {}
    if not restored:  # before any other file: without config.json the folder would hold no run
        record.begin(0, [], meta)
    log = MetricsLog(
        folder,
        resume_step=restored.step if restored else _unsaved_rows(folder),
        tensorboard=report.tensorboard,
        wandb=report.wandb,
        counts=meta.get("logs"),
    )
    if restored:
        record.begin(restored.step, log.gaps, meta)
        record.checkpoint_committed()
    return log


def _initial_params(run: Run, folder: Path) -> PyTree | None:
    """The parameters of ``train.init_from``, if the config has it and there is no checkpoint yet.

    Raises:
      UserError: missing parameters, or ones that do not fit; before the workdir is made.
    """
    source = run.config.train.init_from
    resumes = from_first(bool(Checkpointer(folder / CHECKPOINTS, read_only=True).steps()))
    if not source or resumes:
        return None
    try:
        other = Path(os.path.expanduser(source))
        check_identity(other, saved.read_config(other))
        return restore_subtree(other / CHECKPOINTS, run.abstract_state.params).state
    except UserError as error:
        raise UserError(f"train.init_from={source!r}: {error}") from error


def _first_state(run: Run, initial_params: PyTree | None) -> TrainState:
    state = run.init_state()
    return state if initial_params is None else dataclasses.replace(state, params=initial_params)


def _unsaved_rows(folder: Path) -> int | None:
    """0 to cut the rows of a run that was killed before its first checkpoint; None without rows."""
    return 0 if (folder / METRICS).exists() else None
