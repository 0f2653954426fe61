"""Recording how a run routes the same held-out sequences, before its first step and at every
evaluation. ``moejax.record.probe`` has the files, ``moejax.train.probe.arrays`` their contents."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from moejax import mesh as meshes
from moejax.errors import UserError
from moejax.record import probe
from moejax.record.probe import Arrays
from moejax.train.probe.arrays import (
    ARRAYS,
    Constant,
    InputStatistic,
    OutputArray,
    TokenArray,
    WeightArray,
    formats,
)
from moejax.train.probe.forward import INPUT, INPUT_EXPERT, probe_forward
from moejax.train.probe.leakage import rows_per_batch
from moejax.train.processes import compiled_together, is_first, on_host
from moejax.train.setup import Run, real_rows
from moejax.train.state import TrainState

SAMPLED = 2048
"""Tokens per layer that statistics of the layers' inputs are computed from."""


class Recorder:
    """Writes the probe of a run; does nothing for ``report.probe_rows=0`` and for dense models.

    Args:
      resume_step: the step that was restored: files of later steps are removed, so that the resumed
        run records them again. None for a run that starts.
      eval_rows: ``train.eval_rows`` of the run's first start (default: the present value). The
        probe's rows are chosen among these for the whole life of the run.
    """

    def __init__(
        self, run: Run, folder: Path, resume_step: int | None, eval_rows: int | None = None
    ):
        self._run, self._folder = run, folder
        eval_rows = int(eval_rows or run.config.train.eval_rows)
        held_out = _eval_batches(run, eval_rows)
        self._rows = probe_rows(run, held_out)
        if is_first():
            for step, path in probe.step_files(folder).items():
                if resume_step is None or step > resume_step:
                    path.unlink()
        if not self._rows:
            return
        self._batches = _batches(run, held_out, self._rows)
        exists = (probe.folder(folder) / "tokens.npz").exists()
        if is_first() and (resume_step is None or not exists):
            tokens = run.data.probe_arrays(_held_out(held_out, self._rows), eval_rows)
            probe.save_tokens(folder, tokens)

    def record(self, step: int, state: TrainState) -> None:
        """Routes the probe with the state after ``step`` updates and writes the step's file."""
        if not self._rows:
            return
        jax.block_until_ready(state)  # no collectives of two programs at once: see Run.evaluate
        outputs = on_host(self._forward(state, self._batches))
        if is_first():
            arrays = _step_arrays(self._run, outputs, self._rows)
            probe.save_step(self._folder, step, arrays, formats())

    @functools.cached_property
    def _forward(self) -> Any:
        sampled = math.ceil(SAMPLED / self._rows)
        jitted = jax.jit(functools.partial(probe_forward, task=self._run.task, sampled=sampled))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._batches
        )
        return compiled_together(jitted, self._run.abstract_state, shapes)


def _eval_batches(run: Run, eval_rows: int) -> list[dict[str, np.ndarray]]:
    return run.data.eval_batches(run.config.train.batch_size, eval_rows)


def probe_rows(run: Run, held_out: list[dict[str, np.ndarray]]) -> int:
    """The number of the probe's rows: ``report.probe_rows``, and no more than evaluations have."""
    wanted = run.config.report.probe_rows
    return min(wanted, _count(held_out)) if wanted and run.task.model.num_moe_layers else 0


def _count(held_out: list[dict[str, np.ndarray]]) -> int:
    return sum(int(real_rows(batch).sum()) for batch in held_out)


def check(run: Run, folder: Path, eval_rows: int | None = None) -> None:
    """Refuses to resume a run with another number of sequences than it has recorded so far.

    Raises:
      UserError: the number differs, or the recorded file cannot be read.
    """
    held_out = _eval_batches(run, eval_rows or run.config.train.eval_rows)
    path, rows = probe.folder(folder) / "tokens.npz", probe_rows(run, held_out)
    if not rows or not path.exists():
        return
    try:
        recorded = len(Arrays(path)["row"])
    except UserError as error:
        raise UserError(f"{error}; remove it, and the run writes it anew") from error
    if recorded != rows:
        raise UserError(
            f"report.probe_rows={run.config.report.probe_rows} but the run in {folder} has recorded"
            f" {recorded} sequences; set it to {recorded}, to 0 to record no more, or use another "
            "--workdir"
        )


def _held_out(batches: list[dict[str, np.ndarray]], rows: int) -> dict[str, np.ndarray]:
    """The probe's rows, evenly spread over those of evaluations. They keep their ids, since some
    gates look rows up by id."""
    chosen_N = np.arange(rows) * _count(batches) // rows
    return {name: np.concatenate([b[name] for b in batches])[chosen_N] for name in batches[0]}


def _batches(run: Run, held_out: list[dict[str, np.ndarray]], rows: int) -> dict[str, Array]:
    """The probe's rows on the devices as [P, B, ...], padded with rows that are not valid."""
    size = rows_per_batch(run, rows)
    parts = math.ceil(rows / size)
    sharding = NamedSharding(run.mesh, PartitionSpec(None, *meshes.batch_spec()))
    placed = {}
    for name, x in _held_out(held_out, rows).items():
        padded = np.pad(x, [(0, parts * size - rows), *[(0, 0)] * (x.ndim - 1)])
        parted = padded.reshape(parts, size, *x.shape[1:])
        placed[name] = jax.make_array_from_callback(parted.shape, sharding, parted.__getitem__)
    return placed


def _step_arrays(run: Run, outputs: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    """The arrays of a step's file, from the outputs of ``probe_forward``."""
    inputs, experts = (np.swapaxes(outputs[name][:rows], 0, 1) for name in (INPUT, INPUT_EXPERT))
    layers = [
        (x.reshape(-1, x.shape[-1]), expert.reshape(-1))
        for x, expert in zip(inputs, experts, strict=True)
    ]
    arrays: dict[str, Any] = {}
    for name, array in ARRAYS.items():
        match array:
            case TokenArray():
                arrays[name] = np.swapaxes(outputs[name][:rows], 0, 1)
            case OutputArray():
                arrays[name] = outputs[name][:rows]
            case WeightArray():
                arrays |= {name: outputs[name]} if name in outputs else {}
            case InputStatistic():
                arrays[name] = [array.compute(x_TD, expert_T) for x_TD, expert_T in layers]
            case Constant():
                arrays[name] = array.compute(run)
    return arrays
