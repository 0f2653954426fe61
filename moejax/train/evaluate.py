"""Evaluating the checkpoint of a run."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moejax.config import Config, settings
from moejax.config.saved import CHECKPOINTS, read_config
from moejax.errors import UserError
from moejax.train import agreement, compile_cache, record_probe, record_routing, setup
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.checkpoint.restore import Part, Restored
from moejax.train.cost import budget
from moejax.train.metrics import rows
from moejax.train.metrics.log import warn
from moejax.train.parameters import ROUTER, path_names
from moejax.train.probe import leakage
from moejax.train.processes import is_first
from moejax.train.setup import Run
from moejax.train.state import TrainState
from moejax.train.workdir.contents import check_identity, check_text, missing_checkpoints


class OpenRun(NamedTuple):
    """A run with the state of one of its checkpoints."""

    run: Run
    state: TrainState
    step: int


@contextlib.contextmanager
def open_run(
    config: Config, workdir: str, step: int | None, train_steps: int = 0
) -> Iterator[OpenRun]:
    """The run with its newest good checkpoint, or that of ``step``, on the config's mesh.

    ``train_steps``: the number of batches of training data that will be needed as well.

    Raises:
      UserError: no such checkpoint, or the run's own text has changed.
    """
    run = setup.prepare(config)
    budget.check_evaluation(run)
    run.check_gate_data(train_steps)
    folder = Path(workdir)
    saved = read_config(folder)
    settings.warn_of_changes(saved)
    steps = Checkpointer(folder / CHECKPOINTS, read_only=True).steps()
    agreement.on_run(folder, saved, steps)
    remedy = "name the text to evaluate on with --config.data.path"
    check_text(saved, config, run.data.fingerprint, remedy)
    _check_encoding(saved, run)
    check_identity(folder, saved)
    missing = missing_checkpoints(folder, saved)
    with (
        compile_cache.kept(config.report.compile_cache),
        jax.set_mesh(run.mesh),
        Checkpointer(folder / CHECKPOINTS, read_only=True) as checkpoints,
    ):
        same_gate = config.moe.gate.name == saved["config"]["moe"]["gate"]["name"]
        restore = _whole_state if same_gate or _has_router(run) else _without_router
        restored = restore(run, checkpoints, step)
        if restored is None:
            missing = missing and f"{missing}; put the folder back"
            raise UserError(missing or f"{workdir} has no checkpoint to evaluate; train first")
        if missing and step is None and is_first():
            warn(f"{missing}; that one is evaluated")
        yield OpenRun(run, restored.state, restored.step)


def evaluate(
    config: Config,
    workdir: str,
    step: int | None = None,
    record_routing_to: str = "",
    record_steps: int = 0,
    leak_rows: int = 0,
    record_probe_too: bool = False,
) -> dict[str, Any]:
    """The held-out row of a run's checkpoint.

    With ``record_routing_to`` a file is written with the routing of these rows, and of the training
    batches of the first ``record_steps`` steps. With ``leak_rows`` the row also has the leakage
    measured on that many sequences (see ``leakage.measure``). With ``record_probe_too`` the workdir
    gets the routing and the row, for its report (see ``record_probe``).

    Raises:
      UserError: see ``open_run``; a routing that cannot be recorded.
      Divergence: the loss is not finite.
    """
    if record_routing_to:
        record_routing.check_target(config, record_routing_to, record_steps)
    if leak_rows:
        leakage.check(config)
    with open_run(config, workdir, step, record_steps) as (run, state, at):
        if record_probe_too:
            record_probe.check(run, workdir)
        if record_routing_to:
            needed = record_routing.recording_bytes(run, record_steps)
            record_routing.check_size(needed, record_routing_to)
        totals = run.evaluate(state, map(run.put, run.eval_batches()))
        row = rows.eval_row(at, totals, run.data, run.leak)
        if record_probe_too:
            record_probe.write(run, state, at, workdir, row)
        if record_routing_to:
            recording = record_routing.record(run, state, at, record_steps)
            record_routing.write(recording, record_routing_to)
        return row | leakage.measure(run, state, leak_rows) if leak_rows else row


def _check_encoding(saved: dict[str, Any], run: Run) -> None:
    """Refuses a table whose features have another meaning than those of the run's.

    Raises:
      UserError: they have.
    """
    if saved.get("encoding", "") and run.data.about().get("encoding") != saved["encoding"]:
        raise UserError(
            f"data.path={run.config.data.path!r}: its categories, or mean and spread of its "
            "numbers, are not those of the run's training rows, so that the same id or number "
            "would mean something else; evaluate on the run's own table"
        )


def _whole_state(run: Run, checkpoints: Checkpointer, step: int | None) -> Restored | None:
    return checkpoints.restore(run.abstract_state, step=step)


def _without_router(run: Run, checkpoints: Checkpointer, step: int | None) -> Restored | None:
    """The model's parameters for a gate that has none of its own; it starts anew."""
    state = jax.block_until_ready(run.init_state())  # see Run.evaluate
    restored = checkpoints.restore(state.params, step=step, part=Part("params/", without=ROUTER))
    if restored is None:
        return None
    at = jax.numpy.int32(restored.step)
    whole = dataclasses.replace(state, params=restored.state, step=at)
    return dataclasses.replace(restored, state=whole)


def _has_router(run: Run) -> bool:
    paths = jax.tree_util.tree_leaves_with_path(run.abstract_state.params)
    return any(ROUTER in path_names(path) for path, _ in paths)
