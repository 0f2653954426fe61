"""Write the table of memory per device into docs/real-models.md: python scripts/memory_table.py

For the configs in ``configs/published`` (values of the models' own config.json): parameters, the
state of fine-tuning and activations per device on several meshes, by the run's own rules of
sharding. Everything is shapes: nothing is allocated, and no device is needed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from moejax.config import Config
from moejax.hf.families import READABLE
from moejax.hf.fields import config_of
from moejax.hf.keys import Theirs
from moejax.mesh import AXES, BATCH_AXES, axis_size
from moejax.tasks.language.task import LanguageModel
from moejax.train.cost import memory
from moejax.train.optim import make_optimizer
from moejax.train.parameters import EXPERT_WEIGHTS, path_names
from moejax.train.state import TrainState, abstract, count_parameters

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "configs" / "published"
PAGE = ROOT / "docs" / "real-models.md"
BEGIN, END = "<!-- table: scripts/memory_table.py -->", "<!-- end of table -->"

MODELS = ("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "deepseek-moe-16b", "mixtral-8x7b")
DEVICES = (1, 2, 4, 8, 16)
LENGTH = 2048
"""Tokens of a sequence in fine-tuning: one sequence per device and micro-batch."""
CACHED = 4096
"""Tokens of a sequence in generation."""
DEVICE_BYTES = 80e9
"""An H100 or A100 with 80 GB."""
FITS = 0.95
"""The share of a device that may be taken; the rest is for XLA's temporary buffers."""


class Published(NamedTuple):
    """A published model, in our fields. ``params``: the shapes of its parameters."""

    name: str
    repository: str
    config: Config
    task: LanguageModel
    params: Any

    @property
    def parameters(self) -> int:
        return count_parameters(self.params)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses: k experts of each layer."""
        experts = sum(
            x.size
            for path, x in jax.tree.leaves_with_path(self.params)
            if path_names(path)[-1] in EXPERT_WEIGHTS
        )
        model = self.task.model
        k = model.gate.columns(model.moe.num_experts)
        return self.parameters - experts + experts * k // model.moe.num_experts


def published(name: str) -> Published:
    """The model of a file in ``configs/published``."""
    path = PUBLISHED / f"{name}.json"
    keys = json.loads(path.read_text(encoding="utf-8"))
    theirs = Theirs(keys, str(path))
    config = config_of(READABLE[theirs.get("model_type")].read(theirs))
    config.model.dtype, config.model.remat = "bfloat16", "full"
    task = LanguageModel.from_config(config, config.model.vocab_size)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    return Published(name, keys["_name_or_path"], config, task, params)


def meshes(devices: int, model: Published) -> Iterator[AbstractMesh]:
    """The meshes that split experts over some of the devices, and weights over the rest."""
    experts = model.config.moe.num_experts
    for expert in (n for n in range(1, devices + 1) if devices % n == 0 and experts % n == 0):
        sizes = {"data": 1, "fsdp": devices // expert, "expert": expert, "tensor": 1}
        kinds = (AxisType.Auto,) * len(AXES)
        yield AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=kinds)


class Memory(NamedTuple):
    """Bytes per device on a mesh.

    ``tuning``: parameters, gradients and the two moments of AdamW, all in float32.
    ``activations``: of one sequence of ``LENGTH`` tokens per device with ``model.remat=full``, or
    the largest matrix product if that is larger.
    """

    mesh: AbstractMesh
    bfloat16: int
    float32: int
    tuning: int
    activations: int


def parameter_bytes(model: Published, mesh: AbstractMesh, dtype: Any = jnp.float32) -> int:
    """Bytes of the parameters on one device."""
    typed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.params)
    return memory.tree_bytes_per_device(abstract(typed, mesh))


def on_mesh(model: Published, mesh: AbstractMesh) -> Memory:
    """The memory of a model on a mesh."""
    optimizer, _ = make_optimizer(model.config.optim, 1000, model.params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    key: Any = jax.ShapeDtypeStruct((2,), jnp.uint32)
    moments = jax.eval_shape(optimizer.init, model.params)
    state = TrainState(step, model.params, moments, (), key)
    float32 = parameter_bytes(model, mesh)
    tuning = memory.tree_bytes_per_device(abstract(state, mesh)) + float32
    bfloat16 = parameter_bytes(model, mesh, jnp.bfloat16)
    return Memory(mesh, bfloat16, float32, tuning, activation_bytes(model, mesh))


def activation_bytes(model: Published, mesh: AbstractMesh) -> int:
    """See ``Memory``: from the traced loss of a batch."""
    task, rows = model.task, mesh.size
    gate_state = jax.eval_shape(task.init_gate_state)
    batch = {
        "tokens": jnp.zeros((rows, LENGTH + 1), jnp.int32),
        "valid": jnp.ones((rows, LENGTH), bool),
        "row": jnp.arange(rows, dtype=jnp.int32),
    }

    def loss(params: Any) -> jax.Array:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), gate_state)
        totals = task.forward(params, state, batch, jnp.int32(0), jax.random.key(0), train=True)
        return task.objective(totals, totals.items)

    with jax.sharding.use_abstract_mesh(mesh):
        kept, product = memory.forward_bytes(loss, model.params, devices=mesh.size)
    return max(kept // axis_size(mesh, *BATCH_AXES), product)


def cache_bytes(model: Published) -> int:
    """The KV cache of one sequence of ``CACHED`` tokens, in bfloat16."""

    def arrays(params: Any) -> list[jax.Array]:
        return jax.tree.leaves(model.task.built(params).empty_memory(1, CACHED))

    shapes = jax.eval_shape(arrays, model.params)
    return sum(x.size * x.dtype.itemsize for x in shapes)


def shown(model: Published, devices: int) -> list[AbstractMesh]:
    """The meshes of the table: all weights split alike, and experts as far as their number goes."""
    found = list(meshes(devices, model))
    return found if devices == 1 else [found[0], found[-1]]


def flags(mesh: AbstractMesh) -> str:
    """The mesh as fields of a config."""
    return " ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items() if size > 1)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f}" if number < 1e10 else f"{number / 1e9:.1f}"


def _fitting(number: float) -> str:
    return "yes" if number <= FITS * DEVICE_BYTES else "no"


HEAD = (
    "model", "devices", "mesh", "weights bf16", "weights f32", "KV cache", "fine-tuning state",
    "activations", "generates in f32", "fine-tunes",
)  # fmt: skip


def cells(model: Published, mesh: AbstractMesh) -> tuple[str, ...]:
    """A row of the table."""
    found, cache = on_mesh(model, mesh), cache_bytes(model)
    return (
        model.name,
        str(mesh.size),
        flags(found.mesh) or "-",
        *map(_gigabytes, (found.bfloat16, found.float32, cache, found.tuning, found.activations)),
        _fitting(found.float32 + cache),
        _fitting(found.tuning + found.activations),
    )


def table(names: tuple[str, ...] = MODELS, devices: tuple[int, ...] = DEVICES) -> str:
    """The sizes of the models, and the memory per device."""
    models = [published(name) for name in names]
    lines = ["| model | repository | parameters | per token |", f"|{' --- |' * 4}"]
    for model in models:
        total, active = (f"{x / 1e9:.2f}B" for x in (model.parameters, model.active_parameters))
        lines.append(f"| {model.name} | {model.repository} | {total} | {active} |")
    lines += ["", f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for model in models:
        for count in devices:
            lines += [f"| {' | '.join(cells(model, mesh))} |" for mesh in shown(model, count)]
    return "\n".join(lines)


def render(page: str, text: str) -> str:
    """The page with this table."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
    print(PAGE)
