"""The trainer's own step on a tiny language model, built from a config without data or files."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from moejax import config as configs
from moejax.config.overrides import apply_overrides
from moejax.data.corpus import Corpus
from moejax.gating import TopK
from moejax.mesh import batch_spec, make_mesh
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.task import LanguageModel
from moejax.train.optim import make_optimizer
from moejax.train.setup import Run
from moejax.types import GateContext, GateOutput, GateParams, GateSpec, GateState, MoEStats

VOCAB, BATCH, LENGTH = 64, 8, 16
F = 22
"""Hidden width of an expert, the only size here with the factor 11: an array whose number of
elements is a multiple of 11 holds expert weights, or the hidden layer that belongs to them."""

TINY = {
    "model.d_model": 16,
    "model.d_ff": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.attention": "xla",
    "moe.d_ff": F,
    "moe.capacity_factor": 1.0,
    "train.batch_size": BATCH,
    "train.seq_len": LENGTH,
    "train.steps": 5,
    "optim.learning_rate": 0.01,
    "optim.warmup_steps": 0,
    "report.probe_rows": 0,
}


@dataclasses.dataclass(frozen=True)
class Biased(TopK):
    """Top-k with a bias per expert that falls while the expert has more than its share: a gate
    with state, as in loss-free balancing."""

    def init_state(self, spec: GateSpec) -> GateState:
        return jnp.zeros(spec.num_experts)

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: jax.Array, context: GateContext
    ) -> GateOutput:
        width = x_GTD.shape[-1]
        # The bias as one more input, always 1: it moves the choice and the weights.
        x_GTD = jnp.pad(x_GTD.astype(jnp.float32), ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
        router = {"router_DE": jnp.concatenate([params["router_DE"], state[None]])}
        assert router["router_DE"].shape[0] == width + 1
        return super().__call__(router, (), x_GTD, context)

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        return state + 0.01 * jnp.sign(jnp.mean(stats.load_E) - stats.load_E)


def make(
    shape: Mapping[str, int],
    gate: str = "top_k",
    devices: Sequence[jax.Device] | None = None,
    **changes: Any,
) -> Run:
    """A run on a mesh of the first devices; ``changes`` are config fields with __ for the dot."""
    devices = jax.devices() if devices is None else devices
    config = configs.default()
    given = {"moe.gate.name": gate, **{k.replace("__", "."): v for k, v in changes.items()}}
    fields = {**TINY, **given, **{f"mesh.{axis}": size for axis, size in shape.items()}}
    apply_overrides(config, [f"{name}={value}" for name, value in fields.items()])
    configs.validate(config)
    task = LanguageModel.from_config(config, VOCAB)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    optimizer, schedule = make_optimizer(config.optim, config.train.steps, params)
    nothing = np.zeros(0, np.uint16)
    corpus = Corpus(nothing, nothing, VOCAB, None, "", "none", 0)
    return Run(
        config=config,
        leak="",
        data=TextSource(
            corpus,
            config.train.seq_len,
            config.train.batch_size,
            config.train.seed,
            config.train.eval_rows,
        ),
        mesh=make_mesh(shape, devices[: math.prod(shape.values())]),
        task=task,
        optimizer=optimizer,
        schedule=schedule,
    )


def batch(step: int) -> dict[str, np.ndarray]:
    """A batch of random tokens with some padding, the same for everyone."""
    rng = np.random.default_rng(step)
    valid = np.arange(LENGTH) < rng.integers(LENGTH // 2, 2 * LENGTH, (BATCH, 1))
    return {
        "tokens": rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32),
        "valid": valid,
        "row": np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int32),
    }


def shapes(run: Run):
    """The state and the batch of a run, as shapes with shardings."""
    by_row = NamedSharding(run.mesh, batch_spec(run.mesh.abstract_mesh))
    rows = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row)
        for name, x in run.data.shapes(BATCH).items()
    }
    return run.abstract_state, rows


def compiled_text(run: Run) -> str | None:
    """The compiled training step."""
    with jax.set_mesh(run.mesh):
        return run.train_step.lower(*shapes(run)).compile().as_text()
