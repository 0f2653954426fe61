"""From a routing to the experts and back, on any mesh."""

from functools import partial
from typing import Any

import chex
import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from moejax import mesh as meshes
from moejax.dispatch import transports
from moejax.dispatch.exchange import Site
from moejax.dispatch.transports import Job, Tokens
from moejax.kernels import kernels_pass_check_vma
from moejax.kernels.vma import vary_over, varying_axes
from moejax.types import ExpertWeights, Priority, Routing, Transport

TRANSPORTS = {
    "cells": transports.cells,
    "dropless": transports.dropless,
    "dropless_once": transports.dropless_once,
    "gather": transports.gather,
    "all_experts": transports.all_experts,
}

GROUPED = ("dropless", "dropless_once", "gather")
"""Transports that call ``grouped_matmul``, whose TPU and GPU kernels the vma check refuses."""


def dispatch(
    x_GTD: Float[Array, "G T D"],
    routing: Routing,
    score_GT: Float[Array, "G T"],
    weights: ExpertWeights,
    *,
    transport: Transport,
    activation: str,
    capacity: int = 0,
    priority: Priority = "position",
) -> tuple[Float[Array, "G T D"], Bool[Array, "G T K"]]:
    """Each token's weighted sum of its experts' outputs, and which of its pairs found room.

    Without a mesh it runs where it is called. Under ``jax.set_mesh`` tokens are split over (data,
    fsdp, expert), experts over ``expert``, hidden widths over ``tensor``; the result does not
    depend on the split. ``score_GT`` orders tokens for priorities ``gate`` and ``random``.
    ``capacity`` (slots per group and expert) matters to ``cells`` only.

    Raises:
      ValueError: unknown transport; experts or groups that do not divide over the mesh.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport={transport!r} is unknown; use one of {', '.join(TRANSPORTS)}")
    chex.assert_equal_shape([routing.expert_GTK, routing.weight_GTK])
    chex.assert_equal_shape_prefix([x_GTD, routing.expert_GTK], 2)
    mesh = meshes.ambient()
    num_experts, groups = weights.up_EDF.shape[0], x_GTD.shape[0]
    shards = meshes.axis_size(mesh, "expert")
    batch_shards = meshes.axis_size(mesh, *meshes.BATCH_AXES)
    if num_experts % shards:
        more = (num_experts // shards + 1) * shards
        raise ValueError(
            f"num_experts={num_experts} is not a multiple of the 'expert' mesh axis ({shards}); "
            f"use {more - shards or shards} or {more}"
        )
    if groups % batch_shards:
        raise ValueError(
            f"{groups} groups of tokens do not divide over data x fsdp x expert = {batch_shards} "
            "shards; make the number of sequences (or groups) a multiple of it"
        )
    tokens = Tokens(x_GTD, routing.expert_GTK, routing.weight_GTK, score_GT)
    site = Site(
        shards=shards,
        expert_axis="expert" if shards > 1 else None,
        tensor_axis="tensor" if meshes.axes_in(mesh, ("tensor",)) else None,
    )
    job = Job(num_experts, activation, site, capacity, priority)
    return _run(tokens, weights, transport=transport, job=job, mesh=mesh)


@partial(jax.jit, static_argnames=("transport", "job", "mesh"))
def _run(
    tokens: Tokens, weights: ExpertWeights, *, transport: str, job: Job, mesh: AbstractMesh | None
) -> Any:
    """Jitted so that a layer called outside ``jax.jit`` is one program, not hundreds."""

    def run(tokens: Tokens, weights: ExpertWeights) -> Any:
        # Declared here, the backward sum over `tensor` is one of tokens; at the experts' matmuls it
        # would be one of every copy of a token, for each matmul.
        axes = varying_axes(*jax.tree.leaves(weights))
        tokens = tokens._replace(x_gTD=vary_over(tokens.x_gTD, axes))
        return TRANSPORTS[transport](tokens, weights, job)

    if mesh is None:
        return run(tokens, weights)
    by_token = meshes.batch_spec(mesh)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(by_token, weight_specs(weights)),
        out_specs=by_token,
        check_vma=transport not in GROUPED or kernels_pass_check_vma(),
    )(tokens, weights)


def weight_specs(weights: ExpertWeights) -> Any:
    """PartitionSpecs of the weights: experts and hidden width split, D whole."""
    mesh = meshes.ambient()
    expert = "expert" if meshes.axes_in(mesh, ("expert",)) else None
    tensor = "tensor" if meshes.axes_in(mesh, ("tensor",)) else None
    wide, narrow = P(expert, None, tensor), P(expert, tensor, None)
    names = ExpertWeights._fields
    by_name = {"gate_EDF": wide, "up_EDF": wide, "down_EFD": narrow}
    leaves = [by_name[name] for name, w in zip(names, weights, strict=True) if w is not None]
    return jax.tree.unflatten(jax.tree.structure(weights), leaves)
