"""Everything that the training loop needs, from a config: devices, data, task, optimizer, steps."""

import dataclasses
import functools
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from moejax import mesh as meshes
from moejax.config import Config, validate
from moejax.config.tasks import task_entry
from moejax.data.source import Checked, Source
from moejax.errors import UserError
from moejax.job.launch import configure_devices, join_processes, started_devices
from moejax.record.routing import row_digests
from moejax.tasks.task import Batch, Task, Totals
from moejax.train import agreement
from moejax.train.optim import make_optimizer
from moejax.train.processes import compiled_together
from moejax.train.state import TrainState, abstract
from moejax.train.step import eval_step, train_step
from moejax.types import GateTraits


@dataclasses.dataclass(frozen=True)
class Run:
    """A validated run, ready to compile. Everything here follows from the config.

    ``leak`` lists the inputs of a token's output besides earlier tokens; "" if none.
    """

    config: Config
    leak: str
    data: Source
    mesh: Mesh
    task: Task
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the training state; no array is made."""
        return abstract(jax.eval_shape(self.fresh_state), self.mesh)

    @functools.cached_property
    def train_step(self) -> Any:
        """The jitted update; it donates the state."""
        step = functools.partial(
            train_step,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            grad_accum=self.config.train.grad_accum,
        )
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(state, None))
        return compiled_together(jitted, self.abstract_state, self.abstract_batch)

    @functools.cached_property
    def eval_step(self) -> Any:
        """The jitted evaluation of one batch."""
        jitted = jax.jit(functools.partial(eval_step, task=self.task))
        return compiled_together(jitted, self.abstract_state, self.abstract_batch)

    @functools.cached_property
    def _row_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, meshes.batch_spec())

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows = self.data.shapes(self.config.train.batch_size)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._row_sharding)
            for name, x in rows.items()
        }

    def init_state(self) -> TrainState:
        """A fresh state; each device makes only its own shards."""
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(self.fresh_state, out_shardings=state)()

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> list[Totals]:
        """The totals of every batch, on the devices.

        Virtual CPU devices share threads: with collectives of many programs in flight, each may
        hold a thread that another one waits for, and XLA gives up after 40 seconds. So on these
        devices the batches run one at a time.
        """
        one_by_one = self.mesh.devices.flat[0].platform == "cpu" and self.mesh.size > 1
        totals = []
        for batch in batches:
            totals.append(self.eval_step(state, batch))
            if one_by_one:
                jax.block_until_ready(totals[-1])
        return totals

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """A global batch of host arrays, on the devices that need its rows."""
        return {
            name: jax.make_array_from_callback(x.shape, self._row_sharding, x.__getitem__)
            for name, x in batch.items()
        }

    def check_gate_data(self, train_steps: int) -> None:
        """Checks that a gate or a source that depends on certain rows has those it needs.

        Raises:
          UserError: it has not.
        """
        if isinstance(self.data, Checked):
            self.data.check_rows(train_steps)
        model, train = self.task.model, self.config.train
        if not model.num_moe_layers:
            return
        traits = GateTraits.of(model.gate)
        if traits.check_data is None:
            return
        per_row = task_entry(self.config.task.name).sequences_per_row
        length = self.task.units.tokens_per_row // per_row
        train_rows, rows = train_steps * train.batch_size * per_row, self.eval_rows() * per_row
        try:
            traits.check_data(model.num_moe_layers, length, train_rows, rows)
            if traits.check_rows is not None:
                for batch in self.eval_batches():
                    real = real_rows(batch)
                    traits.check_rows(False, batch["row"][real], row_digests(batch)[real])
                for batch in map(self.data.train_batch, range(train_steps)):
                    traits.check_rows(True, batch["row"], row_digests(batch))
        except ValueError as error:
            raise UserError(f"moe.{error}") from error

    def eval_batches(self) -> list[dict[str, np.ndarray]]:
        """The held-out rows of an evaluation."""
        train = self.config.train
        return self.data.eval_batches(train.batch_size, train.eval_rows)

    def eval_rows(self) -> int:
        """The number of rows of an evaluation."""
        return sum(int(real_rows(batch).sum()) for batch in self.eval_batches())

    def _token_counts(self) -> np.ndarray:
        return self.data.token_counts(self.task.model.vocab_size)

    def fresh_state(self) -> TrainState:
        """The state before the first step, to be traced."""
        key = jax.random.key(self.config.train.seed)
        params = self.task.init(jax.random.fold_in(key, 0))
        return TrainState(
            step=jax.numpy.int32(0),
            params=params,
            opt_state=self.optimizer.init(params),
            gate_state=self.task.init_gate_state(self._token_counts),
            key=jax.random.key_data(jax.random.fold_in(key, 1)),
        )


def prepare(config: Config, workdir: str | Path | None = None) -> Run:
    """Validates, starts the devices and loads the data. Writes nothing.

    In a job of several processes they compare all of it, and the workdir if they will write there.

    Raises:
      UserError: a mistake in the config or the data, or devices that do not fit.
    """
    visibility = validate(config)
    join_processes(config)
    agreement.on_settings(config)
    if workdir is not None:
        agreement.on_folder(Path(workdir))
    configure_devices(config)
    devices = devices_of(config)
    validate(config, len(devices))
    if config.model.get("attention") == "cudnn" and devices[0].platform != "gpu":
        raise UserError(
            f"model.attention=cudnn runs on NVIDIA GPUs and the devices are {devices[0].platform}; "
            "use model.attention=auto"
        )
    task, data = _build(config)
    agreement.on_data(data.fingerprint, devices)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    optimizer, schedule = make_optimizer(config.optim, config.train.steps, params)
    return Run(
        config=config,
        leak=visibility.mark,
        data=data,
        mesh=meshes.make_mesh({axis: config.mesh[axis] for axis in meshes.AXES}, devices),
        task=task,
        optimizer=optimizer,
        schedule=schedule,
    )


def _build(config: Config) -> tuple[Task, Source]:
    module, _, function = task_entry(config.task.name).build.partition(":")
    return getattr(importlib.import_module(module), function)(config)


def devices_of(config: Config) -> list[jax.Device]:
    """All devices; if virtual CPU devices were started earlier, as many as the mesh has."""
    devices = started_devices()
    fixed = [config.mesh[axis] for axis in meshes.AXES]
    if devices[0].platform == "cpu" and jax.process_count() == 1 and -1 not in fixed:
        return devices[: int(np.prod(fixed))]
    return devices


def real_rows(batch: dict[str, np.ndarray]) -> np.ndarray:
    """True for each row of a batch that holds any token or item, bool[B]."""
    valid = batch["valid"]
    return np.any(valid.reshape(len(valid), -1), axis=1)
