"""Adam on mixtures of experts, all seeds and settings of a gate in one program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from experiments.dselect_k.gates import StaticGate
from experiments.dselect_k.problems import TRAIN, Experts, outputs, small_experts

BATCH = 256
STEPS_PER_EPOCH = TRAIN // BATCH
"""78; the 32 examples left over are others in every epoch."""
OF_TRAINING = 2**16
"""Keeps the keys of training apart from those of the problem with the same seed."""


class Setting(NamedTuple):
    """Settings in which the runs of one program differ."""

    learning_rate: float | Array
    entropy: float | Array = 0.0
    """lambda, of the entropy averaged over the batch."""
    range: float | Array = 1.0
    """Weight of the penalty 1 / sum_e r_e, if E is no power of two."""


class Run(NamedTuple):
    weight_SME: Any
    """Evaluation weights of each task, before the first step and after every one.

    Traced inside the program, numpy arrays outside.
    """
    experts: Experts | None
    """As learned; None if they were frozen."""


def train_all(
    gate: StaticGate, x_RNX: Array, target_RNM: Array, settings: list[Setting], *,
    num_experts: int, epochs: int, learn_experts: bool = False,
) -> Run:  # fmt: skip
    """Trains every setting (axis L) on the problems of seeds 0 .. R-1: leaves are [R, L, ...].

    Without ``learn_experts`` x are the outputs of frozen experts. Runs of a seed share the order
    of examples, the start and the noise.
    """

    def one(x_NX: Array, target_NM: Array, order_PSB: Array, seed: Array, setting: Setting) -> Run:
        return _train(gate, x_NX, target_NM, order_PSB, seed, setting, num_experts, learn_experts)

    seeds = len(x_RNX)
    over_settings = jax.vmap(one, (None, None, None, None, 0))
    stacked = Setting(*(jnp.asarray(field, jnp.float32) for field in zip(*settings, strict=True)))
    program = jax.jit(jax.vmap(over_settings, (0, 0, 0, 0, None)))
    order_RPSB = np.stack([_order(seed, epochs) for seed in range(seeds)])
    run = program(x_RNX[:, :TRAIN], target_RNM[:, :TRAIN], order_RPSB, jnp.arange(seeds), stacked)
    return jax.tree.map(np.asarray, run)


def _order(seed: int, epochs: int) -> np.ndarray:
    """The examples of every step [P, S, B]. Of numpy: jax sorts to shuffle, at ten times the time.

    16 bits are enough for 20,000 examples.
    """
    random = np.random.default_rng(seed)
    order_PN = np.stack([random.permutation(TRAIN).astype(np.uint16) for _ in range(epochs)])
    return order_PN[:, : STEPS_PER_EPOCH * BATCH].reshape(epochs, STEPS_PER_EPOCH, BATCH)


def _train(
    gate: StaticGate, x_NX: Array, target_NM: Array, order_PSB: Array, seed: Array,
    setting: Setting, num_experts: int, learn_experts: bool,
) -> Run:  # fmt: skip
    key = jax.random.fold_in(jax.random.key(seed), OF_TRAINING)
    gate_key, experts_key, noise_key = jax.random.split(key, 3)
    task_keys = jax.random.split(gate_key, target_NM.shape[1])
    params = {"gate": jax.vmap(lambda key: gate.init(key, num_experts))(task_keys)}
    if learn_experts:
        params["experts"] = small_experts(experts_key, num_experts)
    optimizer = optax.adam(setting.learning_rate)

    def weights(params: PyTree) -> Array:
        return jax.vmap(lambda one: gate.evaluation(one, num_experts))(params["gate"])

    def loss(params: PyTree, x_BX: Array, target_BM: Array, step: Array) -> Array:
        keys_M = jax.random.split(jax.random.fold_in(noise_key, step), target_BM.shape[1])
        found = jax.vmap(lambda one, key: gate.training(one, num_experts, BATCH, step, key))(
            params["gate"], keys_M
        )
        features_BE = outputs(params["experts"], x_BX) if learn_experts else x_BX
        error_BM = _mixed(features_BE, found.weight_BE) - target_BM
        extra_M = setting.entropy * found.entropy + setting.range * found.range
        return jnp.mean(error_BM**2) + jnp.mean(extra_M)

    def step(carry: PyTree, row_B: Array) -> tuple[PyTree, Array]:
        params, state, count = carry
        grads = jax.grad(loss)(params, x_NX[row_B], target_NM[row_B], count)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, count + 1), weights(params)

    start = (params, optimizer.init(params), jnp.int32(0))
    epoch = lambda carry, rows_SB: jax.lax.scan(step, carry, rows_SB)
    (end, _, _), weight_PSME = jax.lax.scan(epoch, start, order_PSB)
    path_SME = weight_PSME.reshape(-1, *weight_PSME.shape[2:])
    path_SME = jnp.concatenate([weights(params)[None], path_SME])
    return Run(path_SME, end.get("experts"))


def _mixed(features_BE: Array, weight_MTE: Array) -> Array:
    """Predictions [B, M]; T is B, or 1 where all examples have the same weights."""
    if weight_MTE.shape[1] == 1:
        return features_BE @ weight_MTE[:, 0].T
    return jnp.sum(features_BE[:, None] * jnp.swapaxes(weight_MTE, 0, 1), axis=-1)
