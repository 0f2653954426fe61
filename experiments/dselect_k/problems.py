"""Data made by a mixture of experts, of one task or of many."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

WIDTH, HIDDEN = 10, 4
TRAIN, TEST = 20_000, 5_000
NOISE = 0.01


class Experts(NamedTuple):
    """f_e(x) = w2_e . relu(W1_e x + b1_e) + b2_e."""

    up_EHD: Array
    up_EH: Array
    down_EH: Array
    down_E: Array


class Problem(NamedTuple):
    """Examples, targets of M tasks, and what made them. The last TEST examples are for testing."""

    x_ND: Array
    features_NE: Array
    """The true experts' outputs, with mean 0 and variance 1 over the training examples."""
    target_NM: Array
    weight_ME: Array
    """The true mixture of each task, exactly 0 for experts that are not in it."""


def random_experts(key: Array, num_experts: int) -> Experts:
    """All parameters N(0, 1), as the truth is made."""
    E, H = num_experts, HIDDEN
    shapes = (E, H, WIDTH), (E, H), (E, H), (E,)
    keys = jax.random.split(key, len(shapes))
    return Experts(*(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)))


def small_experts(key: Array, num_experts: int) -> Experts:
    """Initial learned experts: weights N(0, 1 / fan-in), biases 0."""
    drawn = random_experts(key, num_experts)
    return Experts(
        drawn.up_EHD / WIDTH**0.5, 0 * drawn.up_EH, drawn.down_EH / HIDDEN**0.5, 0 * drawn.down_E
    )


def outputs(experts: Experts, x_ND: Array) -> Array:
    """Outputs of every expert for every example [N, E]."""
    num_experts, hidden, width = experts.up_EHD.shape
    # One matmul for all experts: a batched one of matrices this small is slow.
    flat_DZ = experts.up_EHD.reshape(num_experts * hidden, width).T
    hidden_NEH = jax.nn.relu((x_ND @ flat_DZ).reshape(-1, num_experts, hidden) + experts.up_EH)
    return jnp.sum(hidden_NEH * experts.down_EH, axis=-1) + experts.down_E


def one_task(key: Array, num_experts: int, k: int) -> Problem:
    """A mixture of k distinct experts with weights softmax(N(0, 1))."""
    experts_key, data_key, set_key, weight_key = jax.random.split(key, 4)
    chosen_K = jax.random.permutation(set_key, num_experts)[:k]
    share_K = jax.nn.softmax(jax.random.normal(weight_key, (k,)))
    weight_1E = jnp.zeros((1, num_experts)).at[0, chosen_K].set(share_K)
    return _examples(data_key, random_experts(experts_key, num_experts), weight_1E)


def many_tasks(key: Array, num_tasks: int, num_experts: int) -> Problem:
    """Two halves of the tasks, each with its own half of the experts.

    A task mixes all experts of its half, with weights softmax(N(0, 1)) of its own.
    """
    experts_key, data_key, weight_key = jax.random.split(key, 3)
    half = num_experts // 2
    share_MK = jax.nn.softmax(jax.random.normal(weight_key, (num_tasks, half)), axis=-1)
    first_M1 = jnp.arange(num_tasks)[:, None] < num_tasks // 2
    weight_ME = jnp.concatenate([share_MK * first_M1, share_MK * ~first_M1], axis=1)
    return _examples(data_key, random_experts(experts_key, num_experts), weight_ME)


def _examples(key: Array, experts: Experts, weight_ME: Array) -> Problem:
    x_key, noise_key = jax.random.split(key)
    x_ND = jax.random.normal(x_key, (TRAIN + TEST, WIDTH))
    raw_NE = outputs(experts, x_ND)
    mean_E, std_E = raw_NE[:TRAIN].mean(axis=0), raw_NE[:TRAIN].std(axis=0)
    features_NE = (raw_NE - mean_E) / std_E
    clean_NM = features_NE @ weight_ME.T
    target_NM = clean_NM + NOISE * jax.random.normal(noise_key, clean_NM.shape)
    return Problem(x_ND, features_NE, target_NM, weight_ME)
