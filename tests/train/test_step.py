"""One update and one evaluation of a model with one weight, worked by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.options import DispatchOptions
from moejax.tasks.task import Task, Totals
from moejax.train.state import TrainState
from moejax.train.step import eval_step, split_batch, train_step

X = jnp.asarray([1.0, 2.0, 3.0, 4.0])
BATCH = {"x": X, "valid": jnp.asarray([True, True, True, False])}


@dataclasses.dataclass(frozen=True)
class Line(Task):
    """Says w x of every x, which is its loss and its log Z; ten times as much in evaluation."""

    def forward(
        self, params: Any, gate_state: Any, batch: Any, step: Any, key: Any, train: bool
    ) -> Totals:
        w, valid = params["w"], batch["valid"]
        said = jnp.where(valid, w * batch["x"], 0.0) * (1 if train else 10)
        items = jnp.sum(valid)
        return Totals(
            items=items,
            loss=jnp.sum(said),
            log_z_square=jnp.sum(said**2),
            metrics={},
            auxiliary={"load_balance": w * items, "own": 3 * w * items},
            means={},
            mean_square=jnp.zeros(0),
            stats=None,
        )

    def update_gate_state(self, gate_state: Any, totals: Totals) -> Any:
        return gate_state + totals.items

    def hold(self, updates: Any, step: Any) -> Any:
        return jax.tree.map(lambda u: jnp.where(step == 3, u, 0.0), updates)


TASK = Line(
    SimpleNamespace(moe=DispatchOptions(num_experts=1).config),
    (("load_balance", 0.25),),
    output_z_loss=0.5,
)
"""The balance loss counts a quarter; the other one has no weight and counts as it is."""
OPTIMIZER = optax.sgd(0.01)


def state() -> TrainState:
    params = {"w": jnp.float32(2.0)}
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(jnp.int32(3), params, OPTIMIZER.init(params), jnp.int32(10), key)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_uses_the_mean_over_the_whole_batch_in_any_number_of_parts(parts: int):
    """Three items; of two parts one has two of them and the other one."""
    after, metrics = train_step(
        state(),
        BATCH,
        task=TASK,
        optimizer=OPTIMIZER,
        schedule=lambda s: 10.0 * s,
        grad_accum=parts,
    )
    # Loss 2 (1 + 2 + 3), half of 4 (1 + 4 + 9), a quarter of 2 and 6 itself, the last two a mean.
    np.testing.assert_allclose(metrics["total_loss"], (12 + 28) / 3 + 0.5 + 6, rtol=1e-6)
    slope = (6 + 0.5 * 2 * 2 * 14) / 3 + 0.25 + 3
    np.testing.assert_allclose(metrics["grad_norm"], slope, rtol=1e-6)
    np.testing.assert_allclose(after.params["w"], 2 - 0.01 * slope, rtol=1e-6)
    assert metrics["learning_rate"] == 30.0, "that of the update after three completed ones"
    assert (after.step, after.gate_state, metrics["totals"].items) == (4, 13, 3)
    np.testing.assert_array_equal(after.key, state().key)


class Neighbours(Line):
    """As ``Line``, but x is the product over a routing group of two sequences."""

    def forward(self, params, gate_state, batch, step, key, train) -> Totals:
        product = jnp.repeat(jnp.prod(batch["x"].reshape(-1, 2), axis=1), 2)
        return super().forward(params, gate_state, {**batch, "x": product}, step, key, train)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_routing_group_of_two_sequences_is_in_one_part(parts: int):
    moe = DispatchOptions(num_experts=1, group="2").config
    _, metrics = train_step(
        state(),
        {"x": X, "valid": jnp.ones(4, bool)},
        task=Neighbours(SimpleNamespace(moe=moe), (), output_z_loss=0.0),
        optimizer=OPTIMIZER,
        schedule=lambda s: 1.0,
        grad_accum=parts,
    )
    # The losses 2 (1 * 2) and 2 (3 * 4) of two items each, and the auxiliary losses 2 and 6.
    assert metrics["total_loss"] == (2 * 4 + 2 * 24) / 4 + 2 + 6


def test_an_evaluation_runs_with_train_false():
    assert eval_step(state(), BATCH, task=TASK).loss == 120.0


def test_whole_groups_are_dealt_to_the_parts_in_turn():
    parts = split_batch({"row": jnp.arange(8)}, 2, 2)
    np.testing.assert_array_equal(parts["row"], [[0, 1, 4, 5], [2, 3, 6, 7]])
