"""The costs of a run, counted on traced programs and shapes before anything is compiled."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from moejax import mesh as meshes
from moejax.config import Config
from moejax.job.memory import host_memory, memory_of
from moejax.tasks.task import Batch, Task
from moejax.train import processes
from moejax.train.cost import flops, memory, units
from moejax.train.parameters import EXPERT_WEIGHTS, HEAD_MATRICES, path_names
from moejax.train.setup import Run
from moejax.train.state import count_parameters


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations per token of a model whose cost depends on the routing.

    ``fixed`` is everything but the routed experts; each (token, expert) pair, in any MoE layer,
    adds ``per_pair``: one expert on one token. The pairs are in ``metrics.jsonl``: a token of a row
    has layers * experts_per_token * (1 - drop_rate) of them, under Mixture-of-Depths times
    ``mod/to_experts``, the share of tokens that reached the experts.
    """

    fixed: float
    per_pair: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """The costs of a run, counted before anything is compiled."""

    parameters: int
    active_parameters: int
    flops_per_step: float
    """Floating-point operations of one step's forward and backward pass, drop- and padding-free."""
    train_flops: TokenFlops
    """Forward and backward pass, without recomputation."""
    eval_flops: TokenFlops
    """Forward pass."""
    state_bytes: int
    activation_bytes: int
    """Per device: the training state with gradients, and the residuals of the backward pass."""
    product_bytes: int = 0
    """Per device: the largest matrix product of the forward pass, which exists temporarily."""


def count_budget(run: Run) -> Budget:
    """Counts parameters, FLOPs (on the jaxpr) and bytes per device (from shapes and shardings).

    FLOPs are the model's; memory is the program's: on the run's mesh, with its transport's buffers,
    and without activations that are recomputed.
    """
    config, params = run.config, run.abstract_state.params
    batch = run.data.shapes(_micro_batch(config))
    backward, forward = (_countable_pass(run, train=train) for train in (True, False))
    with jax.set_mesh(run.mesh):
        kept, product = memory.forward_bytes(
            lambda p: _loss(run, run.task, p, zeros_like(batch)),
            _without_shardings(params),
            devices=run.mesh.size,
        )
    shards = meshes.axis_size(run.mesh.abstract_mesh, *meshes.BATCH_AXES)
    return Budget(
        parameters=count_parameters(params),
        active_parameters=active_parameters(run),
        flops_per_step=flops.count_flops(backward) * config.train.grad_accum,
        train_flops=_token_flops(run, backward, train=True),
        eval_flops=_token_flops(run, forward, train=False),
        state_bytes=_state_bytes(run),
        activation_bytes=kept // shards,
        product_bytes=product,
    )


def checked_budget(run: Run) -> Budget:
    """The costs of a run that fits in its devices; before anything is compiled.

    The estimate ignores XLA's temporary buffers and its savings by fusion; ``mesh.device_gib``
    overrides the limit.

    Raises:
      UserError: the run does not fit; naming the fields to reduce.
    """
    check_sizes(run)
    costs = count_budget(run)
    largest = max(costs.activation_bytes, costs.product_bytes)
    processes.raise_together(_memory_problem(run, costs.state_bytes, largest))
    if run.config.train.grad_accum > 1:  # an evaluation has the whole batch at once
        check_evaluation(run)
    return costs


def check_evaluation(run: Run) -> None:
    """Refuses an evaluation too large for the run's devices, before anything is compiled.

    Raises:
      UserError: naming the fields to reduce.
    """
    state = memory.tree_bytes_per_device(run.abstract_state)
    problem = _batch_problem(run) or _memory_problem(run, state, 0, train=False)
    processes.raise_together(problem)
    batch = run.data.shapes(run.config.train.batch_size)
    with jax.set_mesh(run.mesh):
        largest = memory.product_bytes(
            lambda p: _loss(run, run.task, p, zeros_like(batch), train=False),
            _without_shardings(run.abstract_state.params),
            devices=run.mesh.size,
        )
    processes.raise_together(_memory_problem(run, state, largest, train=False))


def check_sizes(run: Run) -> None:
    """Refuses a batch or a model too large for the machine, before tracing, which may take minutes.

    Raises:
      UserError: naming the fields to reduce.
    """
    processes.raise_together(_batch_problem(run) or _memory_problem(run, _state_bytes(run), 0))


def _batch_problem(run: Run) -> str:
    """An error for a global batch that this process cannot hold; empty if it can."""
    train, available = run.config.train, host_memory()
    needed = train.batch_size * sum(x.nbytes for x in run.data.shapes(1).values())
    if needed <= available:
        return ""
    return (
        f"train.batch_size={train.batch_size} needs {units.size(needed)} of memory for one batch "
        f"of data, and this machine has {units.size(available)}; lower it"
    )


def _memory_problem(run: Run, state: int, activations: int, train: bool = True) -> str:
    """An error for memory that a device does not have, in training or in evaluation; empty if it
    has enough."""
    config, local = run.config, run.mesh.local_devices
    limit, needed = round(config.mesh.device_gib * 2**30), state + activations
    available = limit or memory_of(local[0], len(local))
    if available is None or needed <= available:
        return ""
    sizes = config.train
    if activations > state:
        what = f"train.batch_size={sizes.batch_size}"
        remedies = ["lower it"]
        if "seq_len" in sizes:
            what, remedies = f"{what} x train.seq_len={sizes.seq_len}", ["lower one of them"]
        if train:
            remedies.append(f"raise train.grad_accum={sizes.grad_accum}")
        if train and config.model.get("remat", "full") != "full":
            remedies.append("set model.remat=full")
    else:
        what = f"a model of {units.count(count_parameters(run.abstract_state.params))} parameters"
        remedies = ["make it smaller", "split it over more devices (mesh.fsdp, mesh.expert)"]
    what += "" if train else " in evaluation"
    parts = f"{units.size(state)} state{' and gradients' if train else ''}"
    parts += f", {units.size(activations)} activations" if activations else ""
    has = f"mesh.device_gib={config.mesh.device_gib:g} allows" if limit else "has"
    return (
        f"{what} needs {units.size(needed)} of memory per device ({parts}), and a device {has} "
        f"{units.size(available)}; {', '.join(remedies)}, or set mesh.device_gib to what you know "
        "it may take"
    )


def _state_bytes(run: Run) -> int:
    """Per device: the training state with gradients."""
    whole = memory.tree_bytes_per_device(run.abstract_state)
    return whole + memory.tree_bytes_per_device(run.abstract_state.params)


def train_flops(run: Run) -> TokenFlops:
    """``count_budget(run).train_flops`` alone, computed faster."""
    return _token_flops(run, _countable_pass(run, train=True), train=True)


def routed_share(model: Any, length: int, train: bool) -> float:
    """The share of a sequence's tokens among the experts' rows of the traced program.

    Mixture-of-Depths routes only a share of the tokens in training. In evaluation all tokens are
    rows, and those that skip the block are padding.
    """
    depths = getattr(model, "depths", None)
    if not train or depths is None or not depths.capacity:
        return 1.0
    return depths.chosen(length) / length


def _micro_batch(config: Config) -> int:
    return config.train.batch_size // config.train.grad_accum


def _loss(run: Run, task: Task, params: PyTree, batch: Batch, train: bool = True) -> jax.Array:
    gate_state, key = zeros_like(run.abstract_state.gate_state), jax.random.key(0)
    totals = task.forward(params, gate_state, batch, jax.numpy.int32(0), key, train=train)
    return task.objective(totals, totals.items)


def _countable_pass(run: Run, train: bool) -> ClosedJaxpr:
    """The traced pass over a micro-batch for counting FLOPs, in training with the backward pass."""
    loss = functools.partial(_loss, run, run.task.countable(), train=train)
    params = _without_shardings(run.abstract_state.params)
    batch = run.data.shapes(_micro_batch(run.config))
    return jax.make_jaxpr(jax.grad(loss) if train else loss)(params, batch)


def _without_shardings(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _token_flops(run: Run, jaxpr: ClosedJaxpr, train: bool) -> TokenFlops:
    """Splits the count of a pass over a micro-batch: only routed experts are grouped matmuls.

    In the traced program their rows are all columns of the routing of all routed tokens.
    """
    model, per_row = run.task.model, run.task.units.tokens_per_row
    tokens = _micro_batch(run.config) * per_row
    fixed = flops.count_flops(jaxpr, grouped=False)
    if not model.num_moe_layers:
        return TokenFlops(fixed / tokens, 0.0)
    columns = model.gate.columns(model.moe.num_experts)
    pairs = tokens * routed_share(model, per_row, train) * model.num_moe_layers * columns
    return TokenFlops(fixed / tokens, (flops.count_flops(jaxpr) - fixed) / pairs)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the described shapes."""
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), tree)


def active_parameters(run: Run) -> int:
    """The parameters that one token uses: in each MoE layer only the experts that it visits, and in
    a mixture of attention heads only its own heads."""
    model = run.task.model
    params = run.abstract_state.params
    total = count_parameters(params)

    def size(names: Sequence[str]) -> int:
        return sum(
            int(np.prod(x.shape))
            for path, x in jax.tree_util.tree_leaves_with_path(params)
            if path_names(path)[-1] in names
        )

    heads = size(HEAD_MATRICES)
    if heads:
        total += heads * model.heads.k // model.heads.experts - heads
    if not model.num_moe_layers:
        return total
    experts = size(EXPERT_WEIGHTS)
    visited = min(model.gate.columns(model.moe.num_experts), model.moe.num_experts)
    return total - experts + experts * visited // model.moe.num_experts
