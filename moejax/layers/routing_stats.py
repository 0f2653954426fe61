"""A layer's routing in numbers, over the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax import losses
from moejax.types import MoEStats, Routing


@jax.jit
def with_cuts(stats: MoEStats, cut_BLE: Array) -> MoEStats:
    """The same, with pairs the gate wanted but had no column for: wanted, and dropped."""
    cut_E = jnp.sum(cut_BLE, axis=(0, 1), dtype=jnp.int32)
    return dataclasses.replace(
        stats,
        load_E=stats.load_E + cut_E,
        dropped_E=stats.dropped_E + cut_E,
        dropped_L=stats.dropped_L + jnp.sum(cut_BLE, axis=(0, 2), dtype=jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="num_tasks")
def with_tasks(stats: MoEStats, routing: Routing, task_B: Array, num_tasks: int) -> MoEStats:
    """The same, with the load of each task (modality)."""
    num_experts = stats.load_E.shape[0]
    load_BE = losses.expert_load(routing.expert_GTK, routing.weight_GTK, num_experts)
    own_MB = task_B == jnp.arange(num_tasks)[:, None]
    load_ME = jnp.sum(jnp.where(own_MB[..., None], load_BE, 0.0), axis=1).astype(jnp.int32)
    return dataclasses.replace(stats, load_ME=jax.lax.stop_gradient(load_ME))


def sum_over_groups(means: dict[str, Array], valid_GT: Array) -> dict[str, Array]:
    """A gate's means per group, weighted by valid tokens and summed."""
    tokens_G = jnp.sum(valid_GT, axis=1).astype(jnp.float32)
    return {
        name: jax.lax.stop_gradient(jnp.tensordot(tokens_G, value_G, axes=1))
        for name, value_G in means.items()
    }


@jax.jit
def collect_stats(routing: Routing, probs_BLE: Array, kept_BLK: Array, valid_BL: Array) -> MoEStats:
    """Counts over the whole batch, from arrays laid out as [B, L, ...]."""
    num_experts = probs_BLE.shape[-1]
    expert_BLK, weight_BLK = routing.expert_GTK, routing.weight_GTK
    active_BLK = weight_BLK > 0
    dropped_BLK = active_BLK & ~kept_BLK
    ones_BLK = jnp.ones_like(weight_BLK)
    served_BL = jnp.any(active_BLK & kept_BLK, axis=-1)

    def count(which_BLK: Array) -> Array:
        return jnp.sum(
            losses.expert_load(expert_BLK, jnp.where(which_BLK, ones_BLK, 0.0), num_experts), axis=0
        ).astype(jnp.int32)

    log_BLE = jnp.log(jnp.where(probs_BLE > 0, probs_BLE, 1.0))
    valid = valid_BL[..., None]
    return jax.lax.stop_gradient(
        MoEStats(
            tokens=jnp.sum(valid_BL, dtype=jnp.int32),
            load_E=count(active_BLK),
            dropped_E=count(dropped_BLK),
            dropped_L=jnp.sum(dropped_BLK, axis=(0, 2), dtype=jnp.int32),
            dropped_K=jnp.sum(dropped_BLK, axis=(0, 1), dtype=jnp.int32),
            unserved_tokens=jnp.sum(valid_BL & ~served_BL, dtype=jnp.int32),
            prob_E=jnp.sum(jnp.where(valid, probs_BLE, 0.0), axis=(0, 1)),
            entropy=-jnp.sum(jnp.where(valid, probs_BLE * log_BLE, 0.0)),
        )
    )
