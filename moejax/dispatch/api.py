"""From a routing to the experts and back, on any mesh."""

from functools import partial
from typing import Any

import chex
import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from moejax import mesh as meshes
from moejax.dispatch.exchange import sum_over_tensor
from moejax.dispatch.merge import merge_experts
from moejax.dispatch.slots import mix_slots
from moejax.kernels import kernels_pass_check_vma
from moejax.kernels.support import forward_mode_refused, vary_over, varying_axes
from moejax.types import (
    ExpertWeights,
    Job,
    Merge,
    Routing,
    Site,
    Slots,
    Tokens,
    Transport,
)


def dispatch(
    x_GTD: Float[Array, "G T D"],
    routing: Routing,
    score_GT: Float[Array, "G T"],
    weights: ExpertWeights,
    *,
    transport: Transport,
    activation: str,
    capacity: int = 0,
) -> tuple[Float[Array, "G T D"], Bool[Array, "G T K"]]:
    """Each token's weighted sum of its experts' outputs, and which of its pairs found room.

    Without a mesh it runs where it is called. Under ``jax.set_mesh`` tokens are split over (data,
    fsdp, expert), experts over ``expert``, hidden widths over ``tensor``; the result does not
    depend on the split. Groups that do not divide over the shards cost what the next multiple does.
    ``score_GT`` orders tokens for priorities ``gate`` and ``random``. ``capacity``: slots per group
    and expert, for a transport that has slots.

    Raises:
      ValueError: a transport that is not a value; experts that do not divide over the mesh.
    """
    if not isinstance(transport, Transport):
        raise ValueError(
            f"transport={transport!r} is not a transport; use a value such as "
            "moejax.dispatch.Dropless()"
        )
    chex.assert_equal_shape([routing.expert_GTK, routing.weight_GTK])
    chex.assert_equal_shape_prefix([x_GTD, routing.expert_GTK], 2)
    mesh = meshes.ambient()
    check_divides(mesh, len(weights.up_EDF))
    tokens = Tokens(x_GTD, routing.expert_GTK, routing.weight_GTK, score_GT)
    job = Job(len(weights.up_EDF), activation, site_on(mesh), capacity)
    with forward_mode_refused('transport="all_experts" (equal to "dropless")'):
        return _run(tokens, weights, transport=transport, job=job, mesh=mesh)


def mix(
    x_GTD: Float[Array, "G T D"], mixing: Slots | Merge, weights: ExpertWeights, activation: str
) -> Float[Array, "G T D"]:
    """Each token's output where tokens are mixed into slots, or experts into one (``Merge``).

    On a mesh as ``dispatch``; for a ``Merge`` the sequences are split over the shards.

    Raises:
      ValueError: experts that do not divide over the mesh.
    """
    mesh = meshes.ambient()
    check_divides(mesh, len(weights.up_EDF))
    if isinstance(mixing, Merge):
        x_BLD = x_GTD.reshape(len(mixing.weight_BNE), -1, x_GTD.shape[-1])
        return _mix(x_BLD, mixing, weights, activation=activation, mesh=mesh).reshape(x_GTD.shape)
    with forward_mode_refused("a gate that does not mix into slots"):
        return _mix(x_GTD, mixing, weights, activation=activation, mesh=mesh)


def check_divides(mesh: AbstractMesh | None, num_experts: int) -> None:
    """Raises ValueError unless the experts divide over the mesh."""
    shards = meshes.axis_size(mesh, "expert")
    if num_experts % shards:
        more = (num_experts // shards + 1) * shards
        raise ValueError(
            f"num_experts={num_experts} is not a multiple of the 'expert' mesh axis ({shards}); "
            f"use {more - shards or shards} or {more}"
        )


def site_on(mesh: AbstractMesh | None) -> Site:
    """The location of the experts for a computation inside ``shard_map`` on this mesh."""
    shards = meshes.axis_size(mesh, "expert")
    return Site(
        shards=shards,
        expert_axis="expert" if shards > 1 else None,
        tensor_axis="tensor" if meshes.axes_in(mesh, ("tensor",)) else None,
    )


@partial(jax.jit, static_argnames=("transport", "job", "mesh"))
def _run(
    tokens: Tokens,
    weights: ExpertWeights,
    *,
    transport: Transport,
    job: Job,
    mesh: AbstractMesh | None,
) -> Any:
    """Jitted so that a layer called outside ``jax.jit`` is one program, not hundreds."""

    def run(tokens: Tokens, weights: ExpertWeights) -> Any:
        # Declared here, the backward sum over `tensor` is one of tokens; at the experts' matmuls it
        # would be one of every copy of a token, for each matmul.
        axes = varying_axes(*jax.tree.leaves(weights))
        tokens = tokens._replace(x_gTD=vary_over(tokens.x_gTD, axes))
        return transport.run(tokens, weights, job)

    if mesh is None:
        return run(tokens, weights)
    checked = not transport.calls_grouped_matmul or kernels_pass_check_vma()
    specs = (weight_specs(weights),)
    return meshes.on_batch_shards(run, mesh, specs, check_vma=checked)(tokens, weights)


@partial(jax.jit, static_argnames=("activation", "mesh"))
def _mix(
    x: Array, mixing: Slots | Merge, weights: ExpertWeights, *, activation: str, mesh: Any
) -> Array:
    site = site_on(mesh)

    def run(tokens: tuple[Array, Slots | Merge], weights: ExpertWeights) -> Array:
        x, mixing = tokens
        if isinstance(mixing, Merge):
            return sum_over_tensor(merge_experts(x, mixing, weights, activation, site), site)
        return mix_slots(x, mixing, weights, activation, site)

    if mesh is None:
        return run((x, mixing), weights)
    return meshes.on_batch_shards(run, mesh, (weight_specs(weights),))((x, mixing), weights)


def weight_specs(weights: ExpertWeights) -> Any:
    """PartitionSpecs of the weights: experts and hidden width split, D whole."""
    mesh = meshes.ambient()
    expert = "expert" if meshes.axes_in(mesh, ("expert",)) else None
    tensor = "tensor" if meshes.axes_in(mesh, ("tensor",)) else None
    wide, narrow = P(expert, None, tensor), P(expert, tensor, None)
    names = ExpertWeights._fields
    bias = P(expert, tensor)
    by_name = {
        "gate_EDF": wide, "up_EDF": wide, "down_EFD": narrow,
        "gate_bias_EF": bias, "up_bias_EF": bias,
    }  # fmt: skip
    leaves = [by_name[name] for name, w in zip(names, weights, strict=True) if w is not None]
    return jax.tree.unflatten(jax.tree.structure(weights), leaves)
