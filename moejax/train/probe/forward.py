"""The probe's forward pass on the devices: one program for all of its sequences."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from moejax.tasks.task import Task
from moejax.train.probe.arrays import ARRAYS, OutputArray, TokenArray, WeightArray, layer_routing
from moejax.train.state import TrainState
from moejax.types import MoEInfo

INPUT, INPUT_EXPERT = "x", "class"
"""Names of the sampled inputs of the MoE layers, and of the expert of largest weight of each."""


def probe_forward(
    state: TrainState, batches: dict[str, Array], *, task: Task, sampled: int
) -> dict[str, Array]:
    """The arrays of a step's file, from ``batches`` [P, B, ...] of the probe's sequences.

    All have the shape [P * B, M, ...], with the M MoE layers, except those of outputs [P * B, ...]
    and of weights. `INPUT` and `INPUT_EXPERT` are returned for ``sampled`` tokens per sequence.
    """
    key = jax.random.wrap_key_data(state.key)

    def tap(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
        routed = layer_routing(x_BLD, info)
        expert_BL = first_choice(routed["expert"], routed["weight"])
        inputs = {INPUT: x_BLD.astype(jnp.float32), INPUT_EXPERT: expert_BL}
        arrays = {
            name: array.compute(x_BLD, info)
            for name, array in ARRAYS.items()
            if isinstance(array, TokenArray)
        }
        return arrays | {name: sample(x, sampled) for name, x in inputs.items()}

    def one(batch: dict[str, Array]) -> dict[str, Array]:
        predictions, aux = task.apply(
            state.params, state.gate_state, batch, state.step, key, train=False, tap=tap
        )
        taps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), aux.taps)
        return taps | {
            name: array.compute(task, predictions, batch)
            for name, array in ARRAYS.items()
            if isinstance(array, OutputArray)
        }

    def concatenated(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    arrays = jax.tree.map(concatenated, jax.lax.map(one, batches))
    for name, array in ARRAYS.items():
        if isinstance(array, WeightArray):
            value = array.compute(task, state.params)
            arrays |= {} if value is None else {name: value}
    return arrays


def first_choice(
    expert_BLK: Int[Array, "B L K"], weight_BLK: Float[Array, "B L K"]
) -> Int[Array, "B L"]:
    """Each token's expert of largest weight, whether or not it had room; -1 without one."""
    at_BL1 = jnp.argmax(weight_BLK, axis=-1, keepdims=True)
    expert_BL = jnp.take_along_axis(expert_BLK, at_BL1, axis=-1)[..., 0]
    return jnp.where(jnp.max(weight_BLK, axis=-1) > 0, expert_BL, -1)


def sample(x_BL: Shaped[Array, "B L ..."], count: int) -> Shaped[Array, "B S ..."]:
    """At most ``count`` evenly spread tokens per sequence, shifted by one in each next sequence."""
    batch, length, *rest = x_BL.shape
    count = min(count, length)
    at_BS = (np.arange(count) * length // count + np.arange(batch)[:, None]) % length
    return jnp.take_along_axis(x_BL, at_BS.reshape(*at_BS.shape, *[1] * len(rest)), axis=1)
