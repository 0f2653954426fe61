"""Rows of ``metrics.jsonl``, from the totals of a step or an evaluation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.data.source import Mixed, Source
from moejax.tasks.task import Summed, Totals
from moejax.train.state import TrainState
from moejax.train.step import Metrics
from moejax.types import MoEStats

Row = dict[str, Any]


class Divergence(Exception):
    """A loss, gradient or weight that is not finite; the message names the first place."""


def train_row(step: int, metrics: Metrics, leak: str) -> Row:
    """The row of one training step.

    Raises:
      Divergence: the loss, a router or the gradient is not finite.
    """
    metrics = jax.device_get(metrics)
    totals: Totals = metrics["totals"]
    check_finite(step, totals, float(metrics["total_loss"]), float(metrics["grad_norm"]))
    return {
        "step": step,
        "split": "train",
        **_means(totals),
        "total_loss": float(metrics["total_loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "learning_rate": float(metrics["learning_rate"]),
        **routing(totals.stats),
        "leak": leak,
    }


def eval_row(step: int, totals: list[Totals], data: Source, leak: str) -> Row:
    """The row of one evaluation, from the totals of its batches of held-out ``data``, with the
    baselines of the same rows.

    Raises:
      Divergence: the loss or a router is not finite.
    """
    summed: Totals = jax.tree.map(lambda *xs: sum(xs), *jax.device_get(totals))
    check_finite(step, summed)
    means = _means(summed)
    return {
        "step": step,
        "split": "eval",
        **means,
        **data.eval_extras(means["loss"]),
        **(data.extras_apart(means) if isinstance(data, Mixed) else {}),
        **{f"baseline/{name}": loss for name, loss in data.baselines().items()},
        **routing(summed.stats),
        "leak": leak,
    }


def check_finite(
    step: int, totals: Totals, total_loss: float = 0.0, grad_norm: float = 0.0
) -> None:
    """Raises Divergence, naming step and layer, unless losses, routers and gradient are finite."""
    losses_finite = math.isfinite(float(totals.loss)) and math.isfinite(total_loss)
    bad_routers = _bad_routers(totals.stats)
    if losses_finite and not bad_routers.size and math.isfinite(grad_norm):
        return
    bad = np.flatnonzero(~np.isfinite(totals.mean_square))
    if bad.size:
        where = f"the output of layer {bad[0]} (counting from 0) is not finite"
    elif bad_routers.size:
        where = (
            f"the router of MoE layer {bad_routers[0]} (counting from 0 among the MoE layers) is "
            "not finite"
        )
    elif not losses_finite:
        where = "every layer's output is finite but the loss is not"
    else:
        where = "the loss is finite but its gradient is not"
    raise Divergence(f"step {step}: {where}")


def _bad_routers(stats: MoEStats | None) -> np.ndarray:
    """MoE layers with a router output that is not finite.

    A weight that is NaN sends no token, so that outputs and loss may still be finite.
    """
    return np.flatnonzero(() if stats is None else ~np.isfinite(stats.entropy))


def check_state(step: int, state: TrainState) -> None:
    """Raises Divergence, naming the step and an array, unless every value to save is finite.

    An update can overflow although its loss and gradient are finite.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(state)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    }
    finite = jax.device_get(_all_finite(list(named.values())))
    bad = [name for name, good in zip(named, finite, strict=True) if not good]
    if bad:
        more = f" (nor are {len(bad) - 1} more arrays)" if len(bad) > 1 else ""
        raise Divergence(f"step {step}: after the update {bad[0]} is not finite{more}")


@jax.jit
def _all_finite(arrays: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def _means(totals: Totals) -> Row:
    items = max(int(totals.items), 1)

    def of(x: Any) -> Any:
        return x.value() if isinstance(x, Summed) else np.asarray(x / items).tolist()

    def mean(sums: dict[str, Any], prefix: str = "") -> Row:
        return {f"{prefix}{name}": of(x) for name, x in sums.items()}

    return {
        "loss": float(totals.loss) / items,
        **mean(totals.metrics),
        **mean(totals.auxiliary, "aux/"),
        **mean(totals.means),
    }


def routing(stats: MoEStats | None) -> Row:
    """Balance and drops of all MoE layers, and the counts behind them."""
    if stats is None:
        return {}
    load, dropped = np.asarray(stats.load_E), np.asarray(stats.dropped_E)
    tokens, pairs = max(int(stats.tokens.sum()), 1), max(int(load.sum()), 1)
    mean_load = np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
    return {
        "moe/max_vio": float((load.max(axis=-1, keepdims=True) / mean_load - 1).mean()),
        "moe/drop_rate": int(dropped.sum()) / pairs,
        "moe/unserved_rate": int(stats.unserved_tokens.sum()) / tokens,
        "moe/experts_per_token": int(load.sum()) / tokens,
        "moe/router_entropy": float(stats.entropy.sum()) / tokens,
        **{
            f"moe/gate/{name}": float(np.sum(value)) / tokens
            for name, value in stats.gate.items()
            if np.ndim(value) == 1  # a number per layer; vectors are state, not metrics
        },
        **({} if stats.load_ME is None else by_task(np.asarray(stats.load_ME))),
        "moe/load": load.tolist(),
        "moe/dropped": dropped.tolist(),
        "moe/dropped_by_position": np.asarray(stats.dropped_L).tolist(),
        "moe/dropped_by_choice": np.asarray(stats.dropped_K).tolist(),
    }


def by_task(load_LME: np.ndarray) -> Row:
    """The division of E experts among M tasks (modalities) in L layers, from pairs by task.

    ``moe/experts_of_task``: for each task exp(H(expert)), the experts it is spread over;
    ``moe/task_split``: I(expert; task) / H(task), 0 where tasks use experts alike and 1 where no
    expert serves two. Means over layers.
    """
    joint_LME = load_LME / np.maximum(load_LME.sum(axis=(1, 2), keepdims=True), 1)
    task_LM1 = joint_LME.sum(axis=2, keepdims=True)
    expert_L1E = joint_LME.sum(axis=1, keepdims=True)
    share_LME = joint_LME / np.where(task_LM1 > 0, task_LM1, 1.0)
    of_task_L = _entropy(task_LM1[..., 0])
    together_L = _entropy(joint_LME.reshape(len(load_LME), -1))
    shared_L = of_task_L + _entropy(expert_L1E[:, 0]) - together_L
    split_L = shared_L / np.where(of_task_L > 0, of_task_L, 1.0)
    return {
        "moe/experts_of_task": np.exp(_entropy(share_LME)).mean(axis=0).tolist(),
        "moe/task_split": float(split_L.mean()),
        "moe/load_by_task": load_LME.tolist(),
    }


def _entropy(p_E: np.ndarray) -> np.ndarray:
    """The entropy of distributions in the last axis, in nats."""
    return -np.sum(p_E * np.log(np.where(p_E > 0, p_E, 1.0)), axis=-1)
