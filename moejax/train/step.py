"""One optimizer update, and one evaluation of a batch. Pure functions of plain pytrees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from moejax.tasks.task import Batch, Task, Totals
from moejax.train.state import TrainState

Metrics = dict[str, Any]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    grad_accum: int,
) -> tuple[TrainState, Metrics]:
    """One update by the gradient of the whole batch, taken in ``grad_accum`` parts."""
    key = jax.random.wrap_key_data(state.key)
    items = jnp.sum(batch["valid"])

    def loss(params: PyTree, part: Batch) -> tuple[Array, Totals]:
        totals = task.forward(params, state.gate_state, part, state.step, key, train=True)
        return task.objective(totals, items), totals

    grad_fn = jax.value_and_grad(loss, has_aux=True)
    parts = split_batch(batch, grad_accum, task.model.moe.rows_per_group(1))
    (total, totals), grads = add_up(lambda part: grad_fn(state.params, part), parts)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, task.hold(updates, state.step))
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        gate_state=task.update_gate_state(state.gate_state, totals),
        key=state.key,
    )
    metrics = {
        "totals": totals,
        "total_loss": total,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(state.step),
    }
    return new_state, metrics


def eval_step(state: TrainState, batch: Batch, *, task: Task) -> Totals:
    """The batch's totals in evaluation: without noise, with the transport of evaluation."""
    key = jax.random.wrap_key_data(state.key)
    return task.forward(state.params, state.gate_state, batch, state.step, key, train=False)


def add_up(fn: Callable[[Batch], PyTree], parts: Batch) -> PyTree:
    """The sum of ``fn`` over ``[parts, ...]``, one part at a time."""
    first = jax.tree.map(lambda x: x[0], parts)
    if len(parts["valid"]) == 1:
        return fn(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, first))
    return jax.lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, fn(part)), None), zeros, parts
    )[0]


def split_batch(batch: Batch, parts: int, rows: int) -> Batch:
    """``[B, ...] -> [parts, B / parts, ...]``, dealing out runs of ``rows`` sequences in turn.

    Dealing in turn gives every device its share of every part without moving rows. Keeping runs
    whole gives a routing group the same sequences for any number of parts. A single part is the
    batch itself, also where a row holds several sequences and a group fewer rows.
    """
    if parts == 1:
        return jax.tree.map(lambda x: x[None], batch)

    def split(x: Array) -> Array:
        dealt = x.reshape(x.shape[0] // (parts * rows), parts, rows, *x.shape[1:])
        return jnp.swapaxes(dealt, 0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])

    return jax.tree.map(split, batch)
