"""Inputs and loss of language modelling, computed by hand: no model is built."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.losses import CONSISTENCY
from moejax.tasks.language.task import LanguageModel
from moejax.tasks.task import Task
from moejax.types import GateTraits, LayerAux, Policy

KEY = jax.random.key(3)
BATCH = {
    "tokens": jnp.asarray([[5, 1, 0, 1], [6, 0, 0, 0]]),
    "valid": jnp.asarray([[True, True, True], [True, False, False]]),
    "row": jnp.asarray([40, 41]),
}
"""Two sequences of three inputs and targets; the second has one that counts."""
WEIGHTS = {"output_z_loss": 0.0, "seq_len": 3}


@dataclasses.dataclass(frozen=True)
class Fixed(LanguageModel):
    """Says the logits that it is given in the place of parameters: ``first`` to the key it is
    called with, ``second`` to any other."""

    def apply(
        self, params: Any, gate_state: Any, batch: Any, step: Any, key: Any, train: bool, tap=None
    ) -> tuple[Any, Any]:
        same = jnp.array_equal(jax.random.key_data(key), jax.random.key_data(KEY))
        logits_BLV = jnp.where(same, params["first"], params["second"])
        losses = {"load_balance": jnp.where(same, 1.0, 2.0)}
        return logits_BLV, LayerAux(losses, mean_square=jnp.ones(1))


def logits(of_token: list[float]) -> jax.Array:
    """The same for every token of the batch."""
    return jnp.broadcast_to(jnp.asarray(of_token), (2, 3, len(of_token)))


def test_the_totals_of_a_batch_sum_over_targets_of_valid_tokens_only():
    """Targets 1, 0, 1 and 0, and logits log 3 and 0: shares of 3/4 and 1/4."""
    task = Fixed(None, (), **WEIGHTS)
    said = {"first": logits([math.log(3), 0.0]), "second": logits([0.0, 0.0])}
    totals = task.forward(said, (), BATCH, jnp.int32(0), KEY, train=True)
    assert totals.items == 4
    np.testing.assert_allclose(totals.loss, 2 * math.log(4) + 2 * math.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(totals.log_z_square, 4 * math.log(4) ** 2, rtol=1e-6)
    assert totals.metrics["accuracy"] == 2
    assert totals.auxiliary == {"load_balance": 4.0} and totals.mean_square == 4.0


def test_a_policy_is_rewarded_by_the_log_likelihood_of_valid_targets():
    """One layer; three of four choices have the log-probability 0, the fourth -2."""
    log_prob_BL = jnp.asarray([[0.0, -2.0, 0.0], [0.0, -5.0, -5.0]])
    policy = Policy(log_prob_BL[None], jnp.zeros((1, 2, 3)))
    aux = LayerAux(policy=policy, mean_square=jnp.ones(1))
    totals = Fixed(None, (), **WEIGHTS)._totals(logits([math.log(3), 0.0]), aux, BATCH)
    # The second target is 0, with a share of 3/4; the sum is the mean of four times four.
    np.testing.assert_allclose(totals.auxiliary["policy"], 2 * math.log(3 / 4), rtol=1e-6)
    squares = 2 * math.log(4) ** 2 + 2 * math.log(4 / 3) ** 2
    np.testing.assert_allclose(totals.auxiliary["baseline"], squares, rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_a_second_pass_has_another_key_and_half_the_weight_in_training_only(train: bool):
    task = Fixed(None, ((CONSISTENCY, 5.0),), **WEIGHTS)
    said = {"first": logits([1.0, 0.0]), "second": logits([0.0, 1.0])}
    totals = task.forward(said, (), BATCH, jnp.int32(0), KEY, train=train)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    # Two targets are 0 and two are 1, so that both passes have this loss.
    np.testing.assert_allclose(totals.loss, 2 * right + 2 * wrong, rtol=1e-6)
    assert totals.items == 4 and totals.metrics["accuracy"] == 2
    assert totals.auxiliary["load_balance"] == (6.0 if train else 4.0)
    # (p - q) (log p - log q) is tanh(1/2) for every token: see tests/train/test_consistency.py.
    wanted = {CONSISTENCY: 4 * math.tanh(0.5)} if train else {}
    told = {name: v for name, v in totals.auxiliary.items() if name == CONSISTENCY}
    assert told == pytest.approx(wanted, rel=1e-6)


@dataclasses.dataclass(frozen=True)
class EchoTask(LanguageModel):
    """A task whose model returns its inputs."""

    def built(self, params: Any) -> Any:
        return lambda token_BL, context, *rest: ((token_BL, context), None)


def test_a_model_receives_the_inputs_the_rows_and_a_key_of_the_step():
    task = EchoTask(None, (), **WEIGHTS)
    (token_BL, context), _ = task.apply({}, (), BATCH, jnp.int32(7), KEY, train=True)
    np.testing.assert_array_equal(token_BL, BATCH["tokens"][:, :3])
    np.testing.assert_array_equal(context.token_BL, token_BL)
    np.testing.assert_array_equal(context.valid_BL, BATCH["valid"])
    np.testing.assert_array_equal(context.row_B, [40, 41])
    assert context.step == 7
    (_, other), _ = task.apply({}, (), BATCH, jnp.int32(8), KEY, train=True)
    keys = {tuple(jax.random.key_data(key).tolist()) for key in (KEY, context.key, other.key)}
    assert len(keys) == 3, "noise of no two steps is the same"


@dataclasses.dataclass(frozen=True)
class Seeing(LanguageModel):
    """Says with certainty that the next token is the one it sees."""

    def apply(
        self, params: Any, gate_state: Any, batch: Any, step: Any, key: Any, train: bool, tap=None
    ) -> tuple[Any, Any]:
        assert not train
        return 9.0 * jax.nn.one_hot(batch["tokens"][:, :-1], 7), LayerAux()


def test_nats_of_masked_tokens_do_not_depend_on_the_masked_ids():
    """The input is 0 where nothing is valid, whatever is there; the target stays."""
    task = Seeing(None, (), **WEIGHTS)
    tokens = jnp.asarray([[5, 5, 4, 4], [6, 0, 3, 3]])
    got = task.nats({}, (), {**BATCH, "tokens": tokens}, jnp.int32(0), KEY)
    hit, miss = math.log(1 + 6 * math.exp(-9)), math.log(math.exp(9) + 6)
    # Inputs 5, 5, 4 and 6, masked, masked for targets 5, 4, 4 and 0, 3, 3.
    wanted = [[hit, miss, hit], [miss, miss, miss]]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=2e-6)  # float32 of 9


def test_only_a_gates_own_parameters_are_frozen_and_only_when_it_asks_for_it():
    traits = GateTraits(frozen=lambda step: {"embed_VR": step >= 2})
    gate = SimpleNamespace(traits=lambda: traits)
    task = Task(SimpleNamespace(gate=gate, num_moe_layers=1), (), 0.0)
    router = {"embed_VR": jnp.ones(2), "router_DE": jnp.ones(2)}
    updates = {"router": router, "embed_VR": jnp.ones(2)}
    for step, left in ((1, 1.0), (2, 0.0)):
        held = task.hold(updates, jnp.int32(step))
        np.testing.assert_array_equal(held["router"]["embed_VR"], left)
        np.testing.assert_array_equal(held["router"]["router_DE"], 1.0)
        np.testing.assert_array_equal(held["embed_VR"], 1.0)
