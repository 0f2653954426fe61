"""Evaluating the checkpoint of a run, and recording how it routes."""

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from moejax.config import Config, settings
from moejax.config.build import make_gate
from moejax.config.checks import has_experts
from moejax.config.saved import read_config
from moejax.config.tasks import task_entry
from moejax.errors import UserError
from moejax.job.launch import host_memory
from moejax.record import routing as recording
from moejax.record.routing import Recording, Routed
from moejax.tasks.task import Batch, Task
from moejax.train import agreement, compile_cache, setup
from moejax.train.checkpoint.checkpointer import Checkpointer, Restored
from moejax.train.checkpoint.restore import Part
from moejax.train.cost import budget
from moejax.train.metrics import rows
from moejax.train.metrics.log import warn
from moejax.train.probe import leak
from moejax.train.probe.forward import sent
from moejax.train.processes import is_first, on_host
from moejax.train.setup import Run, real_rows
from moejax.train.state import TrainState
from moejax.train.workdir.run_folder import check_identity, check_text, missing_checkpoints
from moejax.types import GateTraits, MoEInfo

ROUTER = "router"
"""The key below which a layer keeps its gate's parameters."""


class Opened(NamedTuple):
    """A run with the state of one of its checkpoints."""

    run: Run
    state: TrainState
    step: int


@contextlib.contextmanager
def opened(
    config: Config, workdir: str, step: int | None, train_steps: int = 0
) -> Iterator[Opened]:
    """The run's newest good checkpoint, or that of ``step``, on the config's mesh.

    ``train_steps``: batches of training data that will be asked for as well.

    Raises:
      UserError: no such checkpoint, or the run's own text has changed.
    """
    this = setup.prepare(config)
    budget.check_evaluation(this)
    this.check_gate_data(train_steps)
    folder = Path(workdir)
    saved = read_config(folder)
    settings.say_changes(saved)
    steps = Checkpointer(folder / "checkpoints", read_only=True).steps()
    agreement.on_run(folder, saved, steps)
    remedy = "name the text to evaluate on with --config.data.path"
    check_text(saved, config, this.data.fingerprint, remedy)
    _check_encoding(saved, this)
    check_identity(folder, saved)
    lost = missing_checkpoints(folder, saved)
    with (
        compile_cache.kept(config.report.compile_cache),
        jax.set_mesh(this.mesh),
        Checkpointer(folder / "checkpoints", read_only=True) as checkpoints,
    ):
        own_gate = config.moe.gate.name == saved["config"]["moe"]["gate"]["name"]
        restore = _own if own_gate or _has_router(this) else _without_router
        restored = restore(this, checkpoints, step)
        if restored is None:
            lost = lost and f"{lost}; put the folder back"
            raise UserError(lost or f"{workdir} has no checkpoint to evaluate; train first")
        if lost and step is None and is_first():
            warn(f"{lost}; that one is evaluated")
        yield Opened(this, restored.state, restored.step)


def evaluate(
    config: Config,
    workdir: str,
    step: int | None = None,
    record_routing: str = "",
    record_steps: int = 0,
    leak_rows: int = 0,
) -> dict[str, Any]:
    """The held-out row of a run's checkpoint.

    With ``record_routing`` a file is written with the routing of these rows, and of the training
    batches of the first ``record_steps`` steps. With ``leak_rows`` the row also has the leak
    measured on that many sequences (see ``leak.measure``).

    Raises:
      UserError: see ``opened``; a routing that cannot be recorded.
      Divergence: the loss is not finite.
    """
    if record_routing:
        _check_target(config, record_routing, record_steps)
    if leak_rows:
        leak.check(config)
    with opened(config, workdir, step, record_steps) as found:
        this, state, at = found
        if record_routing:
            _check_size(size(this, record_steps), record_routing)
        totals = this.evaluate(state, map(this.put, this.eval_batches()))
        row = rows.eval_row(at, totals, this.data, this.leak)
        if record_routing:
            _write(_record(found, record_steps), record_routing)
        return row | leak.measure(this, state, leak_rows) if leak_rows else row


def _check_target(config: Config, path: str, steps: int) -> None:
    if not has_experts(config):
        raise UserError(f"--record-routing={path}: a dense model (moe.every=0) routes nothing")
    if task_entry(config.task.name).sequences_per_row > 1:
        raise UserError(
            f"--record-routing={path}: a row of the task {config.task.name!r} is more than one "
            "sequence, which no recording holds; leave the flag out"
        )
    mixes = GateTraits.of(make_gate(config)).mixes
    if mixes:
        raise UserError(
            f"--record-routing={path}: gate {config.moe.gate.name!r} mixes {mixes} and sends "
            "no token anywhere, so there is no routing to follow; leave the flag out"
        )
    folder = Path(os.path.expanduser(path)).absolute().parent
    if not folder.is_dir():
        raise UserError(f"--record-routing={path}: the folder {folder} does not exist")
    if Path(os.path.expanduser(path)).is_dir():
        raise UserError(f"--record-routing={path} is a folder; name a file")
    if steps > config.train.steps:
        raise UserError(
            f"--record-steps={steps} is more than the run's train.steps={config.train.steps}; "
            f"lower it, or give a longer run's --config.train.steps={steps}"
        )


def size(run: Run, train_steps: int) -> int:
    """Bytes of a recording, before it is compressed."""
    empty = _no_rows(run)
    rows = run.eval_rows() + train_steps * run.config.train.batch_size
    return rows * sum(x.dtype.itemsize * math.prod(n or 1 for n in x.shape) for x in empty)


def _check_size(needed: int, path: str) -> None:
    """Says how large a recording becomes; refuses one that this machine cannot hold."""
    memory = host_memory()
    if 2 * needed > memory:  # the batches, and all of them in one
        raise UserError(
            f"--record-routing={path} would take {2 * needed / 2**30:.1f} GiB of memory and this "
            f"machine has {memory / 2**30:.1f}; lower --record-steps or train.eval_rows"
        )
    megabytes = needed / 1e6
    if megabytes >= 1 and is_first():
        print(f"moejax: recording {megabytes:.0f} MB, less when compressed", file=sys.stderr)


def _write(found: Recording, path: str) -> None:
    if not is_first():
        return
    try:
        recording.save(Path(os.path.expanduser(path)), found)
    except UserError as error:
        raise UserError(f"--record-routing={path}: {error}") from error


def _record(found: Opened, train_steps: int) -> Recording:
    this, state, at = found
    routed = jax.jit(functools.partial(route, task=this.task))
    return Recording(
        _routed(this, state, routed, this.eval_batches()),
        _routed(this, state, routed, [this.data.train_batch(i) for i in range(train_steps)]),
        about(this, at),
    )


def about(run: Run, step: int) -> dict[str, Any]:
    """What a recording says of itself: see ``moejax.record.routing``."""
    model = run.task.model
    seen = model.gate.visibility(model.moe)
    return {
        "num_experts": run.config.moe.num_experts,
        "gate": run.config.moe.gate.name,
        "step": step,
        "fingerprint": run.data.fingerprint,
        "sees": [what for what in recording.SEEN if getattr(seen, f"eval_{what}")],
    }


def followed(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
    """Of a layer, by sequence: all of its routing that made its output, by fields of ``Routed``."""
    zeros_BL = jax.numpy.zeros(x_BLD.shape[:2])
    identity_GT = info.identity_weight_GT
    identity_BL = zeros_BL if identity_GT is None else identity_GT.reshape(zeros_BL.shape)
    return {**sent(x_BLD, info), "identity": identity_BL}


def route(state: TrainState, batch: Batch, *, task: Task) -> dict[str, Array]:
    """How the MoE layers of a state route a batch in evaluation: see ``followed``."""
    key = jax.random.wrap_key_data(state.key)
    _, aux = task.apply(
        state.params, state.gate_state, batch, state.step, key, train=False, tap=followed
    )
    return aux.taps


def _routed(this: Run, state: TrainState, route: Any, batches: list[Any]) -> Routed:
    """The batches' rows that hold tokens, one after the other."""
    parts = [_no_rows(this)]
    for batch in batches:
        found = on_host(route(state, this.put(batch)))
        real = real_rows(batch)
        routed = {name: x[:, real] for name, x in found.items()}
        token, digest = this.data.tokens(batch)[real], recording.row_digests(batch)[real]
        parts.append(Routed(**routed, token=token, digest=digest))
    rows_axis = {"expert": 1, "weight": 1, "kept": 1, "identity": 1, "token": 0, "digest": 0}
    return Routed(
        **{
            field: np.concatenate([getattr(part, field) for part in parts], axis)
            for field, axis in rows_axis.items()
        }
    )


def _no_rows(this: Run) -> Routed:
    model, length = this.task.model, this.task.units.tokens_per_row
    shape = (model.num_moe_layers, 0, length, model.gate.columns(model.moe.num_experts))
    return Routed(
        expert=np.zeros(shape, np.int32),
        weight=np.zeros(shape, np.float32),
        kept=np.zeros(shape, bool),
        identity=np.zeros(shape[:3], np.float32),
        token=np.zeros((0, length), np.int32),
        digest=np.zeros(0, np.uint64),
    )


def _check_encoding(saved: dict[str, Any], this: Run) -> None:
    """Refuses a table whose features stand for something else than those of the run's.

    Raises:
      UserError: they do.
    """
    if saved.get("encoding", "") and this.data.about().get("encoding") != saved["encoding"]:
        raise UserError(
            f"data.path={this.config.data.path!r}: its categories, or mean and spread of its "
            "numbers, are not those of the run's training rows, so that the same id or number "
            "would mean something else; evaluate on the run's own table"
        )


def _own(this: Run, checkpoints: Checkpointer, step: int | None) -> Restored | None:
    return checkpoints.restore(this.abstract_state, step=step)


def _without_router(this: Run, checkpoints: Checkpointer, step: int | None) -> Restored | None:
    """The model's parameters for a gate without any, which starts from its initial state."""
    state = jax.block_until_ready(this.init_state())  # see Run.evaluate
    restored = checkpoints.restore(state.params, step=step, part=Part("params/", without=ROUTER))
    if restored is None:
        return None
    at = jax.numpy.int32(restored.step)
    whole = dataclasses.replace(state, params=restored.state, step=at)
    return dataclasses.replace(restored, state=whole)


def _has_router(this: Run) -> bool:
    paths = jax.tree_util.tree_leaves_with_path(this.abstract_state.params)
    return any(f"'{ROUTER}'" in jax.tree_util.keystr(path) for path, _ in paths)
