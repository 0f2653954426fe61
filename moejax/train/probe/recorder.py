"""Recording how a run routes the same held-out sequences, before its first step and whenever it is
evaluated. ``moejax.record.probe`` has the files, `docs/recorded.md` what is in them."""

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
from moejax.train.probe.forward import look
from moejax.train.probe.leak import rows_per_batch
from moejax.train.probe.representation import collapse, participation
from moejax.train.processes import compiled_together, is_first, on_host
from moejax.train.setup import Run, real_rows
from moejax.train.state import TrainState

SAMPLED = 2048
"""Tokens per layer from which collapse and participation are computed."""


class Recorder:
    """Writes the probe of a run; does nothing for ``report.probe_rows=0`` and for dense models.

    Args:
      resume_step: the step that was restored: what was recorded after it is removed, so that the
        resumed run records it again. None for a run that starts.
      eval_rows: ``train.eval_rows`` of the run's first start, from whose rows the probe's are taken
        for as long as the run goes on (default: that of now).
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
        there = (probe.folder(folder) / "tokens.npz").exists()
        if is_first() and (resume_step is None or not there):
            told = run.data.probe_arrays(_held_out(held_out, self._rows), eval_rows)
            probe.save_tokens(folder, told)

    def record(self, step: int, state: TrainState) -> None:
        """Routes the probe with the state after ``step`` updates and writes what was seen."""
        if not self._rows:
            return
        jax.block_until_ready(state)  # no collectives of two programs at once: see Run.evaluate
        seen = on_host(self._look(state, self._batches))
        if is_first():
            probe.save_step(self._folder, step, _arrays(self._run, seen, self._rows))

    @functools.cached_property
    def _look(self) -> Any:
        sampled = math.ceil(SAMPLED / self._rows)
        jitted = jax.jit(functools.partial(look, task=self._run.task, sampled=sampled))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._batches
        )
        return compiled_together(jitted, self._run.abstract_state, shapes)


def _eval_batches(run: Run, eval_rows: int) -> list[dict[str, np.ndarray]]:
    return run.data.eval_batches(run.config.train.batch_size, eval_rows)


def probe_rows(run: Run, held_out: list[dict[str, np.ndarray]]) -> int:
    """How many rows the probe has: as many as asked for, of those that evaluations have."""
    wanted = run.config.report.probe_rows
    return min(wanted, _count(held_out)) if wanted and run.task.model.num_moe_layers else 0


def _count(held_out: list[dict[str, np.ndarray]]) -> int:
    return sum(int(real_rows(batch).sum()) for batch in held_out)


def check(run: Run, folder: Path, eval_rows: int | None = None) -> None:
    """Refuses to go on with another number of sequences than were recorded so far.

    Raises:
      UserError: it is another one, or what was recorded cannot be read.
    """
    held_out = _eval_batches(run, eval_rows or run.config.train.eval_rows)
    path, rows = probe.folder(folder) / "tokens.npz", probe_rows(run, held_out)
    if not rows or not path.exists():
        return
    try:
        found = len(Arrays(path)["row"])
    except UserError as error:
        raise UserError(f"{error}; remove it, and the run writes it anew") from error
    if found != rows:
        raise UserError(
            f"report.probe_rows={run.config.report.probe_rows} but the run in {folder} has recorded"
            f" {found} sequences; set it to {found}, to 0 to record no more, or use another "
            "--workdir"
        )


def _held_out(batches: list[dict[str, np.ndarray]], rows: int) -> dict[str, np.ndarray]:
    """The probe's rows, evenly spread over those of evaluations, with the ids they have there: some
    gates look these up."""
    chosen_N = np.arange(rows) * _count(batches) // rows
    return {name: np.concatenate([b[name] for b in batches])[chosen_N] for name in batches[0]}


def _batches(run: Run, held_out: list[dict[str, np.ndarray]], rows: int) -> dict[str, Array]:
    """The probe's rows on the devices as [P, B, ...], filled up with rows that are not valid."""
    size = rows_per_batch(run, rows)
    parts = math.ceil(rows / size)
    sharding = NamedSharding(run.mesh, PartitionSpec(None, *meshes.batch_spec()))
    placed = {}
    for name, x in _held_out(held_out, rows).items():
        padded = np.pad(x, [(0, parts * size - rows), *[(0, 0)] * (x.ndim - 1)])
        parted = padded.reshape(parts, size, *x.shape[1:])
        placed[name] = jax.make_array_from_callback(parted.shape, sharding, parted.__getitem__)
    return placed


def _arrays(run: Run, seen: dict[str, np.ndarray], rows: int) -> dict[str, Any]:
    """The arrays of a step's file, from what ``look`` gave."""
    of_experts = {name: x for name, x in seen.items() if name.endswith("_similarity")}
    by_layer = {
        name: np.swapaxes(x[:rows], 0, 1)
        for name, x in seen.items()
        if name not in of_experts and name != "nats"
    }
    layers = list(zip(by_layer.pop("x"), by_layer.pop("class"), strict=True))
    return {
        **by_layer,
        **of_experts,
        "nats": seen["nats"][:rows],
        "collapse": [collapse(x_NS[of >= 0], of[of >= 0]) for x_NS, of in layers],
        "participation": [participation(x.reshape(-1, x.shape[-1])) for x, _ in layers],
        "num_experts": run.config.moe.num_experts,
    }
