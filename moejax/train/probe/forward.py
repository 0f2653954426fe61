"""What the probe looks at, on the devices: one program over all of its sequences."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from moejax.tasks.task import Task
from moejax.train.state import TrainState
from moejax.types import MoEInfo


def sent(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
    """Of a layer, by sequence: the routing that was followed and which pairs found room."""
    arrays = {
        "expert": info.routing.expert_GTK,
        "weight": info.routing.weight_GTK,
        "kept": info.kept_GTK & (info.routing.weight_GTK > 0),
    }
    return {name: x.reshape(*x_BLD.shape[:2], -1) for name, x in arrays.items()}


def look(
    state: TrainState, batches: dict[str, Array], *, task: Task, sampled: int
) -> dict[str, Array]:
    """What a step's file is made of, from ``batches`` [P, B, ...] of the probe's sequences.

    Everything by sequence, [P * B, M, ...] of the M MoE layers, but for what is said of experts.
    ``sampled``: tokens per sequence whose input to the layer, ``x``, and expert, ``class``, are
    returned.
    """
    key = jax.random.wrap_key_data(state.key)

    def tap(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
        routed = sent(x_BLD, info)
        seen = {"x": x_BLD.astype(jnp.float32), "class": best(routed["expert"], routed["weight"])}
        sampled_of = {name: sample(x, sampled) for name, x in seen.items()}
        return {**routed, **router_statistics(x_BLD, info), **sampled_of}

    def one(batch: dict[str, Array]) -> dict[str, Array]:
        predictions, aux = task.apply(
            state.params, state.gate_state, batch, state.step, key, train=False, tap=tap
        )
        taps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), aux.taps)
        return {**taps, "nats": task.token_losses(predictions, batch)}

    def in_a_row(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(in_a_row, jax.lax.map(one, batches)) | similarities(task, state.params)


def best(expert_BLK: Int[Array, "B L K"], weight_BLK: Float[Array, "B L K"]) -> Int[Array, "B L"]:
    """The expert with each token's largest weight, whether it had room or not; -1 without one."""
    at_BL1 = jnp.argmax(weight_BLK, axis=-1, keepdims=True)
    expert_BL = jnp.take_along_axis(expert_BLK, at_BL1, axis=-1)[..., 0]
    return jnp.where(jnp.max(weight_BLK, axis=-1) > 0, expert_BL, -1)


def router_statistics(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
    """Per token: entropy and margin of the router's probabilities, size of its logits."""
    probs_GTE, logits_GTE = info.router.probs_GTE, info.router.logits_GTE
    log_GTE = jnp.log(jnp.where(probs_GTE > 0, probs_GTE, 1.0))
    first_GT1 = jnp.argmax(probs_GTE, axis=-1, keepdims=True)
    others_GTE = jnp.where(jnp.arange(probs_GTE.shape[-1]) == first_GT1, 0.0, probs_GTE)
    arrays = {
        "entropy": -jnp.sum(probs_GTE * log_GTE, axis=-1),
        "margin": jnp.max(probs_GTE, axis=-1) - jnp.max(others_GTE, axis=-1),
        "log_z": jax.nn.logsumexp(logits_GTE, axis=-1),
        "max_logit": jnp.max(jnp.abs(logits_GTE), axis=-1),
    }
    return {name: x.reshape(x_BLD.shape[:2]) for name, x in arrays.items()}


def sample(x_BL: Shaped[Array, "B L ..."], count: int) -> Shaped[Array, "B S ..."]:
    """At most ``count`` tokens of each sequence, evenly spread, one further in every next one."""
    batch, length, *rest = x_BL.shape
    count = min(count, length)
    at_BS = (np.arange(count) * length // count + np.arange(batch)[:, None]) % length
    return jnp.take_along_axis(x_BL, at_BS.reshape(*at_BS.shape, *[1] * len(rest)), axis=1)


def similarities(task: Task, params: PyTree) -> dict[str, Array]:
    """Cosines between experts' weights, and between the router's vectors where it has such."""
    layer = task.expert_layers(params)
    experts = [layer[name] for name in ("gate_EDF", "up_EDF", "down_EFD") if name in layer]
    found = {"expert_similarity": jax.lax.map(cosines, experts)}
    router_MED = router_vectors(layer.get("router", {}))
    if router_MED is not None:
        found["router_similarity"] = jax.lax.map(cosines, [router_MED])
    return found


def cosines(parts: list[Array]) -> Float[Array, "E E"]:
    """Cosine between vectors that are kept in parts [E, ...]; 0 for a vector of zeros."""
    flat = [x.reshape(len(x), -1) for x in parts]
    dot_EE = sum(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) for x in flat)
    length_E = jnp.sqrt(jnp.diagonal(dot_EE))
    inverse_E = jnp.where(length_E > 0, 1.0 / jnp.where(length_E > 0, length_E, 1.0), 0.0)
    return dot_EE * inverse_E[:, None] * inverse_E


def router_vectors(router: PyTree) -> Float[Array, "M E D"] | None:
    """One vector per expert, from the gate's matrix whose name says that one of its axes is E.

    That is ``router_DE``, or else the only such matrix that is not for noise; None without one.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(router):
        name = str(getattr(path[-1], "key", ""))
        if re.fullmatch(r"\w+_(E[A-Z]|[A-Z]E)", name) and "noise" not in name:
            found[name] = leaf if name[-2] == "E" else jnp.swapaxes(leaf, 1, 2)
    if "router_DE" in found:
        return found["router_DE"]
    return next(iter(found.values())) if len(found) == 1 else None
