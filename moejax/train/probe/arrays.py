"""The arrays of a probe's step files: one entry of `ARRAYS` each.

A new array needs its entry here and its line in the table of docs/recorded.md, and nothing more:
the entry says how the array is computed and how it is stored.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from moejax.record.probe import ArrayFormat
from moejax.tasks.task import Batch, Task
from moejax.train.parameters import EXPERT_WEIGHTS, ROUTER, path_names, split_name
from moejax.train.probe.representation import collapse, participation
from moejax.train.setup import Run
from moejax.types import MoEInfo


@dataclasses.dataclass(frozen=True)
class TokenArray:
    """Computed inside each MoE layer: ``compute(x_BLD, info) -> [B, L, ...]``; stored by layer."""

    dtype: str
    axes: str
    compute: Callable[[Array, MoEInfo], Array]


@dataclasses.dataclass(frozen=True)
class OutputArray:
    """Computed from the model's output: ``compute(task, output, batch) -> [B, ...]``."""

    dtype: str
    axes: str
    compute: Callable[[Task, Any, Batch], Array]


@dataclasses.dataclass(frozen=True)
class WeightArray:
    """Computed from the parameters: ``compute(task, params)``; None if the model has none such."""

    dtype: str
    axes: str
    compute: Callable[[Task, PyTree], Array | None]


@dataclasses.dataclass(frozen=True)
class InputStatistic:
    """One number per MoE layer, computed on the host from a sample of the layer's input tokens.

    ``compute(x_TD, expert_T)`` gets the expert of largest weight of each token, -1 without one.
    """

    dtype: str
    axes: str
    compute: Callable[[np.ndarray, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same at every step: ``compute(run)``."""

    dtype: str
    axes: str
    compute: Callable[[Run], Any]


RecordedArray = TokenArray | OutputArray | WeightArray | InputStatistic | Constant


def layer_routing(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
    """The routing that a layer followed, by sequence, and which pairs found room."""
    arrays = {
        "expert": info.routing.expert_GTK,
        "weight": info.routing.weight_GTK,
        "kept": info.kept_GTK & (info.routing.weight_GTK > 0),
    }
    return {name: x.reshape(*x_BLD.shape[:2], -1) for name, x in arrays.items()}


def _router_entropy(info: MoEInfo) -> Array:
    probs_GTE = info.router.probs_GTE
    return -jnp.sum(probs_GTE * jnp.log(jnp.where(probs_GTE > 0, probs_GTE, 1.0)), axis=-1)


def _router_margin(info: MoEInfo) -> Array:
    """The largest probability minus the second largest."""
    probs_GTE = info.router.probs_GTE
    first_GT1 = jnp.argmax(probs_GTE, axis=-1, keepdims=True)
    others_GTE = jnp.where(jnp.arange(probs_GTE.shape[-1]) == first_GT1, 0.0, probs_GTE)
    return jnp.max(probs_GTE, axis=-1) - jnp.max(others_GTE, axis=-1)


def _of_routing(name: str) -> Callable[[Array, MoEInfo], Array]:
    return lambda x_BLD, info: layer_routing(x_BLD, info)[name]


def _of_router(statistic: Callable[[MoEInfo], Array]) -> Callable[[Array, MoEInfo], Array]:
    """A statistic [G, T] of the router's output, by sequence."""
    return lambda x_BLD, info: statistic(info).reshape(x_BLD.shape[:2])


def _expert_similarity(task: Task, params: PyTree) -> Array:
    layer = task.expert_layers(params)
    return jax.lax.map(cosines, [layer[name] for name in EXPERT_WEIGHTS if name in layer])


def _router_similarity(task: Task, params: PyTree) -> Array | None:
    router_MED = router_vectors(task.expert_layers(params).get(ROUTER, {}))
    return None if router_MED is None else jax.lax.map(cosines, [router_MED])


def cosines(parts: list[Array]) -> Float[Array, "E E"]:
    """Cosines between vectors that are stored in parts [E, ...]; 0 for a vector of zeros."""
    flat = [x.reshape(len(x), -1) for x in parts]
    dot_EE = sum(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) for x in flat)
    length_E = jnp.sqrt(jnp.diagonal(dot_EE))
    inverse_E = jnp.where(length_E > 0, 1.0 / jnp.where(length_E > 0, length_E, 1.0), 0.0)
    return dot_EE * inverse_E[:, None] * inverse_E


def router_vectors(router: PyTree) -> Float[Array, "M E D"] | None:
    """One vector per expert, from the gate's matrix that has an axis E by name.

    That is ``router_DE``, otherwise the only such matrix that is not for noise; None without one.
    """
    matrices = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(router):
        name = path_names(path)[-1]
        _, letters = split_name(name)
        if len(letters) == 2 and "E" in letters and "noise" not in name:
            matrices[name] = leaf if letters[0] == "E" else jnp.swapaxes(leaf, 1, 2)
    if "router_DE" in matrices:
        return matrices["router_DE"]
    return next(iter(matrices.values())) if len(matrices) == 1 else None


def _collapse(x_TD: np.ndarray, expert_T: np.ndarray) -> float:
    routed_T = expert_T >= 0
    return collapse(x_TD[routed_T], expert_T[routed_T])


ARRAYS: dict[str, RecordedArray] = {
    "expert": TokenArray("int16", "MNLK", _of_routing("expert")),
    "weight": TokenArray("float32", "MNLK", _of_routing("weight")),
    "kept": TokenArray("bool", "MNLK", _of_routing("kept")),
    "entropy": TokenArray("float32", "MNL", _of_router(_router_entropy)),
    "margin": TokenArray("float32", "MNL", _of_router(_router_margin)),
    "log_z": TokenArray(
        "float32",
        "MNL",
        _of_router(lambda info: jax.nn.logsumexp(info.router.logits_GTE, axis=-1)),
    ),
    "max_logit": TokenArray(
        "float32",
        "MNL",
        _of_router(lambda info: jnp.max(jnp.abs(info.router.logits_GTE), axis=-1)),
    ),
    "nats": OutputArray(
        "float32", "NL", lambda task, output, batch: task.token_losses(output, batch)
    ),
    "expert_similarity": WeightArray("float32", "MEE", _expert_similarity),
    "collapse": InputStatistic("float32", "M", _collapse),
    "participation": InputStatistic("float32", "M", lambda x_TD, _: participation(x_TD)),
    "num_experts": Constant("int32", "", lambda run: run.config.moe.num_experts),
    "router_similarity": WeightArray("float32", "MEE", _router_similarity),
}
"""Every array of ``step-*.npz`` by name, in the order of the file.

Axes: M MoE layers, N sequences, L positions, K columns of a routing, E experts."""


def formats() -> dict[str, ArrayFormat]:
    """Element type and axes of every array. Those of weights may be absent."""
    return {
        name: ArrayFormat(array.dtype, array.axes, optional=isinstance(array, WeightArray))
        for name, array in ARRAYS.items()
    }
