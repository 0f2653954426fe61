"""Statistics of a layer's routing over the whole batch, and the losses made of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax import losses
from moejax.options import MoEOptions
from moejax.types import (
    Context,
    EvalStats,
    GateOutput,
    MoEInfo,
    MoEStats,
    RouterStats,
    Routing,
)


def layer_info(
    output: GateOutput,
    routing: Routing,
    kept_GTK: Array,
    context: Context,
    options: MoEOptions,
    train: bool,
    means: dict[str, Array],
) -> MoEInfo:
    """The report of a layer beside its output.

    Losses and counts describe ``output.routing``, the gate's choice: rerouting must not hide an
    imbalance. ``routing`` is the one that was followed, and ``means`` joins the gate's own.
    """
    batch, length = context.valid_BL.shape
    groups, tokens, _ = kept_GTK.shape
    shape = {"sequence": (batch, length), "group": (groups, tokens), "batch": (1, -1)}

    def scoped(x: Array, scope: str) -> Array:
        return x.reshape(*shape[scope], *x.shape[2:])

    chosen, prob_BLE, kept_BLK = jax.tree.map(
        lambda x: scoped(x, "sequence"), (output.routing, output.stats.probs_GTE, kept_GTK)
    )
    stats = collect_stats(chosen, prob_BLE, kept_BLK, context.valid_BL)
    if output.cut_GTE is not None:
        stats = with_cuts(stats, scoped(output.cut_GTE, "sequence"))
    if options.num_tasks > 1:
        stats = with_tasks(stats, chosen, context.task_B, options.num_tasks)
    elif options.num_sources > 1 and context.source_B is not None:
        stats = with_tasks(stats, chosen, context.source_B, options.num_sources)
    valid_GT = scoped(context.valid_BL, "group")
    gate = sum_over_groups({**output.means, **means}, valid_GT)
    stats = dataclasses.replace(stats, gate=gate)
    entropies = {}
    if options.entropy_floors:
        floor_M = jnp.asarray(options.entropy_floors, jnp.float32)
        entropies = losses.task_entropies(prob_BLE, context.valid_BL, context.task_B, floor_M)
    in_scopes = jax.tree.map(
        lambda x: scoped(x, options.balance_scope),
        (output.routing, output.stats, context.valid_BL),
    )
    return MoEInfo(
        losses={**router_losses(*in_scopes), **entropies, **output.losses},
        stats=stats if train else of_evaluation(stats),
        routing=routing,
        kept_GTK=kept_GTK,
        router=output.stats,
        policy=jax.tree.map(lambda x: scoped(x, "sequence"), output.policy),
        identity_weight_GT=output.identity_weight_GT,
    )


def of_evaluation(stats: MoEStats) -> EvalStats:
    """The same statistics, marked as those of an evaluation."""
    return EvalStats(**{f.name: getattr(stats, f.name) for f in dataclasses.fields(MoEStats)})


def of_training(stats: MoEStats) -> MoEStats:
    """The same statistics, for a gate's update.

    Raises:
      ValueError: they are those of an evaluation.
    """
    if isinstance(stats, EvalStats):
        raise ValueError(
            "update_gate_state got the stats of an evaluation (train=False), which moves no gate's "
            "state; pass those of a call with train=True, or keep the state as it is"
        )
    return stats


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
    """The same, with the load of each task (modality), or of each source of the data."""
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


def router_losses(routing: Routing, router: RouterStats, valid_QU: Array) -> dict[str, Array]:
    """The auxiliary losses of any gate, from arrays laid out as scopes [Q, U, ...]."""
    num_experts = router.probs_GTE.shape[-1]
    load_QE = losses.expert_load(routing.expert_GTK, routing.weight_GTK, num_experts)
    mass_QE = losses.expert_mass(routing.expert_GTK, routing.weight_GTK, num_experts)
    expected_QE = jnp.sum(jnp.where(valid_QU[..., None], router.load_GTE, 0.0), axis=1)
    return {
        "load_balance": losses.load_balance(load_QE, router.probs_GTE, valid_QU),
        "importance": losses.squared_share(mass_QE, valid_QU),
        "load": losses.squared_share(expected_QE, valid_QU),
        "z": losses.z_loss(router.logits_GTE, valid_QU),
    }
