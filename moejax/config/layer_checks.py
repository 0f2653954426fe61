"""Do the sizes of a model's layers fit together, and the mesh? Part of ``moejax.config.checks``."""

import math
from collections.abc import Mapping

from moejax.config.build import make_gate
from moejax.config.tree import Config, get_field
from moejax.errors import UserError
from moejax.types import DepthsConfig, GateTraits, Visibility


def check_layers(config: Config, mesh: Mapping[str, int]) -> None:
    """The sizes of ``models.stack``."""
    model, moe = config.model, config.moe
    if not model.head_dim and model.d_model % model.num_heads:
        raise UserError(
            f"model.d_model={model.d_model} is not a multiple of model.num_heads="
            f"{model.num_heads}; change one of them or set model.head_dim"
        )
    head_dim = model.head_dim or model.d_model // model.num_heads
    if "rope_theta" in model and head_dim % 2:
        raise UserError(
            f"heads of width {head_dim} (model.head_dim, or model.d_model={model.d_model} / "
            f"model.num_heads={model.num_heads}) cannot be rotated in pairs; use an even width"
        )
    if model.attention == "cudnn" and (model.dtype != "bfloat16" or head_dim % 8):
        raise UserError(
            f"model.attention=cudnn needs bfloat16 and heads whose width is a multiple of 8, but "
            f"model.dtype={model.dtype} and the width is {head_dim}; use model.attention=auto"
        )
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads="
            f"{model.num_kv_heads}; each key/value head serves the same number of query heads"
        )
    divides(config, "model.d_model", mesh, "fsdp")
    divides(config, "model.num_heads", mesh, "tensor")
    divides(config, "model.num_kv_heads", mesh, "tensor")
    if moe.every != 1 or moe.first_dense:
        divides(config, "model.d_ff", mesh, "tensor")
    if moe.every:
        divides(config, "moe.num_experts", mesh, "expert")
        divides(config, "moe.d_ff", mesh, "tensor")
    sparse = model.num_layers - moe.first_dense
    if sparse < 1:
        raise UserError(
            f"moe.first_dense={moe.first_dense} must be below model.num_layers={model.num_layers}; "
            "for a dense model use moe.every=0"
        )
    if moe.every and sparse % moe.every:
        raise UserError(
            f"model.num_layers={model.num_layers} - moe.first_dense={moe.first_dense} = {sparse} "
            f"layers are not a multiple of moe.every={moe.every}; use model.num_layers="
            f"{moe.first_dense + math.ceil(sparse / moe.every) * moe.every}"
        )


def check_depths(config: Config) -> Visibility:
    """Blocks and attention heads that tokens are routed to; what the former let a token see."""
    model, moe = config.model, config.moe
    if model.moa_experts and model.moa_k > model.moa_experts:
        raise UserError(
            f"model.moa_k={model.moa_k} must be at most model.moa_experts={model.moa_experts}; "
            "lower it or add heads"
        )
    depths = DepthsConfig(model.mod_capacity, model.mod_every, model.mod_predictor)
    if not depths.capacity:
        return Visibility()
    try:
        depths.check(moe.every)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    layers = model.num_layers - moe.first_dense
    if layers % depths.every:
        raise UserError(
            f"model.num_layers={model.num_layers} - moe.first_dense={moe.first_dense} = {layers} "
            f"layers are not a multiple of model.mod_every={depths.every}; use model.num_layers="
            f"{moe.first_dense + math.ceil(layers / depths.every) * depths.every}"
        )
    gate = make_gate(config)
    needs_data = GateTraits.of(gate).check_data is not None
    if moe.every and (gate.trained_by == "policy" or needs_data):
        raise UserError(
            f"moe.gate.name={moe.gate.name} needs every token of a sequence in training, but "
            f"model.mod_capacity={depths.capacity:g} leaves some out; use model.mod_capacity=0"
        )
    return depths.visibility


def divides(config: Config, name: str, mesh: Mapping[str, int], axis: str) -> None:
    """A field that is sharded over a mesh axis is a multiple of the axis."""
    value, size = get_field(config, name), mesh[axis]
    if value % size:
        near = sorted({max(value // size, 1) * size, (value // size + 1) * size})
        raise UserError(
            f"{name}={value} is not a multiple of mesh.{axis}={size}; use {name}="
            f"{' or '.join(map(str, near))}, or a mesh.{axis} that divides {value}"
        )
