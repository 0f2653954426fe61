"""Recording the routing of a run's checkpoint: see ``moejax.record.routing`` for the file."""

import functools
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from moejax.config import Config
from moejax.config.build import make_gate
from moejax.config.checks import has_experts
from moejax.config.tasks import task_entry
from moejax.errors import UserError
from moejax.job.memory import host_memory
from moejax.record import routing
from moejax.record.routing import Recording, Routed
from moejax.tasks.task import Batch, Task
from moejax.train.probe.arrays import layer_routing
from moejax.train.processes import is_first, on_host
from moejax.train.setup import Run, real_rows
from moejax.train.state import TrainState
from moejax.types import GateTraits, MoEInfo


def check_target(config: Config, path: str, train_steps: int) -> None:
    """Refuses a recording that the config's gate or task cannot have, and a path without a folder.

    Raises:
      UserError: naming the flag and the remedy.
    """
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
    if train_steps > config.train.steps:
        raise UserError(
            f"--record-steps={train_steps} is more than the run's train.steps="
            f"{config.train.steps}; lower it, or give a longer run's "
            f"--config.train.steps={train_steps}"
        )


def recording_bytes(run: Run, train_steps: int) -> int:
    """Bytes of a recording before it is compressed."""
    empty = _no_rows(run)
    rows = run.eval_rows() + train_steps * run.config.train.batch_size
    return rows * sum(x.dtype.itemsize * math.prod(n or 1 for n in x.shape) for x in empty.values())


def check_size(needed: int, path: str) -> None:
    """Prints the size of a large recording, from its bytes.

    Raises:
      UserError: this machine cannot hold it.
    """
    memory = host_memory()
    if 2 * needed > memory:  # the batches, and their concatenation
        raise UserError(
            f"--record-routing={path} would take {2 * needed / 2**30:.1f} GiB of memory and this "
            f"machine has {memory / 2**30:.1f}; lower --record-steps or train.eval_rows"
        )
    megabytes = needed / 1e6
    if megabytes >= 1 and is_first():
        print(f"moejax: recording {megabytes:.0f} MB, less when compressed", file=sys.stderr)


def write(recording: Recording, path: str) -> None:
    """Writes a recording to a path, on the first process.

    Raises:
      UserError: it cannot be written.
    """
    if not is_first():
        return
    try:
        routing.save(Path(os.path.expanduser(path)), recording)
    except UserError as error:
        raise UserError(f"--record-routing={path}: {error}") from error


def record(run: Run, state: TrainState, step: int, train_steps: int) -> Recording:
    """The routing of the rows of an evaluation, and of the first ``train_steps`` batches."""
    routed = jax.jit(functools.partial(route, task=run.task))
    return Recording(
        _routed_rows(run, state, routed, run.eval_batches()),
        _routed_rows(run, state, routed, [run.data.train_batch(i) for i in range(train_steps)]),
        about(run, step),
    )


def about(run: Run, step: int) -> dict[str, Any]:
    """The description of a recording: see ``moejax.record.routing``."""
    model = run.task.model
    visibility = model.gate.visibility(model.moe)
    return {
        "num_experts": run.config.moe.num_experts,
        "gate": run.config.moe.gate.name,
        "step": step,
        "fingerprint": run.data.fingerprint,
        "sees": [what for what in routing.SEES if getattr(visibility, f"eval_{what}")],
    }


def whole_routing(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
    """All of a layer's routing that made its output, by sequence and by names of a recording."""
    zeros_BL = jax.numpy.zeros(x_BLD.shape[:2])
    identity_GT = info.identity_weight_GT
    identity_BL = zeros_BL if identity_GT is None else identity_GT.reshape(zeros_BL.shape)
    return {**layer_routing(x_BLD, info), "identity": identity_BL}


def route(state: TrainState, batch: Batch, *, task: Task) -> dict[str, Array]:
    """The routing of a batch in evaluation, in every MoE layer: see ``whole_routing``."""
    key = jax.random.wrap_key_data(state.key)
    _, aux = task.apply(
        state.params, state.gate_state, batch, state.step, key, train=False, tap=whole_routing
    )
    return aux.taps or {}


def _routed_rows(run: Run, state: TrainState, route: Any, batches: list[Any]) -> Routed:
    """The batches' rows that hold tokens, one after the other."""
    parts = [_no_rows(run)]
    for batch in batches:
        arrays = on_host(route(state, run.put(batch)))
        real = real_rows(batch)
        routed = {name: x[:, real] for name, x in arrays.items()}
        routed["token"] = run.data.tokens(batch)[real]
        routed["digest"] = routing.row_digests(batch)[real]
        parts.append(routed)
    rows_axis = {"expert": 1, "weight": 1, "kept": 1, "identity": 1, "token": 0, "digest": 0}
    arrays = {
        name: np.concatenate([part[name] for part in parts], axis)
        for name, axis in rows_axis.items()
    }
    return routing.from_arrays(arrays, run.config.moe.num_experts)


def _no_rows(run: Run) -> dict[str, np.ndarray]:
    model, length = run.task.model, run.task.units.tokens_per_row
    shape = (model.num_moe_layers, 0, length, model.gate.columns(model.moe.num_experts))
    return {
        "expert": np.zeros(shape, np.int32),
        "weight": np.zeros(shape, np.float32),
        "kept": np.zeros(shape, bool),
        "identity": np.zeros(shape[:3], np.float32),
        "token": np.zeros((0, length), np.int32),
        "digest": np.zeros(0, np.uint64),
    }
