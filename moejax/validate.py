"""Does a config make sense? Checked before anything is compiled or written.

Every mistake is one line with the field, the numbers that do not fit and what to change.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from moejax import gating
from moejax.errors import UserError, suggest
from moejax.mesh import AXES, BATCH_AXES, resolve_shape
from moejax.schema import Config, get_field, table_of
from moejax.types import Gate, MoEConfig, Visibility


@runtime_checkable
class NeedsRows(Protocol):
    """A gate for groups of several sequences: ``least_rows`` or more."""

    def least_rows(self, num_experts: int) -> int: ...


@runtime_checkable
class HasCausalFields(Protocol):
    """A gate whose evaluation is causal with other values of its fields: these."""

    causal: ClassVar[Mapping[str, Any]]


@runtime_checkable
class HasCausalGate(Protocol):
    """A gate that sees the future and knows another, by name, that does alike without."""

    causal_gate: ClassVar[str]


def validate(config: Config, num_devices: int | None = None) -> Visibility:
    """Checks everything that can be known without starting devices.

    With ``num_devices`` (all processes together) also that the mesh fits them; a mesh axis of -1 is
    then filled, and counts as if it were as small as possible before.

    Returns what a token's output may depend on, for the marks on results.

    Raises:
      UserError: the first thing that is wrong.
    """
    _check_ranges(config)
    mesh = resolve_shape({axis: config.mesh[axis] for axis in AXES}, num_devices)
    _check_model(config, mesh)
    _check_batch(config, mesh)
    _check_distributed(config)
    _check_paths(config)
    if not config.moe.every:
        return Visibility()
    _check_moe(config, mesh)
    return _check_visibility(config)


def moe_config(config: Config) -> MoEConfig:
    """The choices around the gate, as the layer takes them.

    Raises:
      UserError: a choice that does not exist.
    """
    moe = config.moe
    try:
        return MoEConfig(**{f.name: moe[f.name] for f in dataclasses.fields(MoEConfig)})
    except ValueError as error:
        raise UserError(f"moe.{error}") from error


def make_gate(config: Config, **changes: Any) -> Gate:
    """The gate that the config names, with the config's hyper-parameters, then ``changes``.

    Raises:
      UserError: unknown, or refuses its hyper-parameters.
    """
    fields = config.moe.gate.to_dict()
    name = fields.pop("name")
    try:
        return gating.make(name, **{**fields, **changes})
    except ValueError as error:
        raise UserError(_gate_message(name, error)) from error


def _gate_message(name: str, error: ValueError) -> str:
    """A gate speaks of ``gate.k`` and ``num_experts``: both are fields of ``moe``."""
    text = " ".join(str(error).split())
    return f"moe.{text}" if text.startswith(("gate.", "num_experts")) else f"gate {name!r}: {text}"


def _check_ranges(config: Config) -> None:
    for name, field in table_of(config).items():
        value = get_field(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} must be a finite number")
        if field.allows(value):
            continue
        if field.choices:
            raise UserError(f"{name}={value!r} is unknown; {suggest(str(value), field.choices)}")
        raise UserError(f"{name}={value} must be {field.range}; default {field.default}")


def _divides(config: Config, name: str, mesh: Mapping[str, int], axis: str) -> None:
    """A field that is sharded over a mesh axis is a multiple of the axis."""
    value, size = get_field(config, name), mesh[axis]
    if value % size:
        near = sorted({max(value // size, 1) * size, (value // size + 1) * size})
        raise UserError(
            f"{name}={value} is not a multiple of mesh.{axis}={size}; use {name}="
            f"{' or '.join(map(str, near))}, or a mesh.{axis} that divides {value}"
        )


def _check_model(config: Config, mesh: Mapping[str, int]) -> None:
    model, moe = config.model, config.moe
    if not model.head_dim and model.d_model % model.num_heads:
        raise UserError(
            f"model.d_model={model.d_model} is not a multiple of model.num_heads="
            f"{model.num_heads}; change one of them or set model.head_dim"
        )
    head_dim = model.head_dim or model.d_model // model.num_heads
    if head_dim % 2:
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
    _divides(config, "model.d_model", mesh, "fsdp")
    _divides(config, "model.num_heads", mesh, "tensor")
    _divides(config, "model.num_kv_heads", mesh, "tensor")
    if moe.every != 1 or moe.first_dense:
        _divides(config, "model.d_ff", mesh, "tensor")
    if moe.every:
        _divides(config, "moe.num_experts", mesh, "expert")
        _divides(config, "moe.d_ff", mesh, "tensor")
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


def _check_batch(config: Config, mesh: Mapping[str, int]) -> None:
    batch, accum = config.train.batch_size, config.train.grad_accum
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    product = " x ".join(f"mesh.{axis}={mesh[axis]}" for axis in BATCH_AXES)
    if batch % accum:
        raise UserError(
            f"train.batch_size={batch} is not a multiple of train.grad_accum={accum}; use "
            f"train.batch_size={math.ceil(batch / accum) * accum}"
        )
    if (batch // accum) % shards:
        each = f" / train.grad_accum={accum} = {batch // accum} sequences" if accum > 1 else ""
        raise UserError(
            f"train.batch_size={batch}{each} is not a multiple of {product} = {shards}; use "
            f"train.batch_size={math.ceil(batch / (accum * shards)) * accum * shards}"
        )


def _check_moe(config: Config, mesh: Mapping[str, int]) -> None:
    moe = config.moe
    choices, gate = moe_config(config), make_gate(config)
    try:
        gate.check(moe.num_experts, train=True)
    except ValueError as error:
        raise UserError(_gate_message(moe.gate.name, error)) from error
    _check_groups(config, choices, mesh, gate)
    for field in ("group", "balance_scope"):
        if moe[field] == "batch" and config.train.grad_accum > 1:
            raise UserError(
                f"moe.{field}=batch needs the whole batch at once, but train.grad_accum="
                f"{config.train.grad_accum} splits it; use train.grad_accum=1 or "
                f"moe.{field}=sequence"
            )


def _check_groups(config: Config, choices: MoEConfig, mesh: Mapping[str, int], gate: Gate) -> None:
    cells = [field for field in ("transport", "eval_transport") if config.moe[field] == "cells"]
    if choices.group == "batch" and cells:
        raise UserError(
            f"moe.group=batch cannot be combined with moe.{cells[0]}=cells, whose slots are per "
            f"group on one device; use moe.{cells[0]}=dropless (or gather, all_experts)"
        )
    micro = config.train.batch_size // config.train.grad_accum
    rows = choices.rows_per_group(micro)
    if micro % rows:
        raise UserError(
            f"train.batch_size / train.grad_accum = {micro} sequences are not a multiple of "
            f"moe.group={choices.group}; use train.batch_size="
            f"{math.ceil(micro / rows) * rows * config.train.grad_accum}"
        )
    least = gate.least_rows(choices.num_experts) if isinstance(gate, NeedsRows) else 1
    if rows < least:
        raise UserError(
            f"moe.gate.name={config.moe.gate.name} chooses among the sequences of a group, with "
            f"these fields at least {least}, but moe.group={choices.group} has {rows}; use "
            f"moe.group={least} or more"
        )
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    if cells and (micro // rows) % shards:
        fit = math.ceil(micro / (rows * shards)) * rows * shards * config.train.grad_accum
        raise UserError(
            f"moe.group={choices.group} makes {micro // rows} groups of a batch of {micro} "
            f"sequences, not a multiple of mesh.data x mesh.fsdp x mesh.expert = {shards}; use "
            f"train.batch_size={fit} or moe.{cells[0]}=dropless"
        )


def _check_visibility(config: Config) -> Visibility:
    """Refuses a language model whose evaluation would see the tokens it predicts."""
    moe, gate = moe_config(config), make_gate(config)
    seen = gate.visibility(moe)
    if not seen.eval_future or config.moe.allow_future_leak:
        return seen
    around = {
        "moe.priority=position": dataclasses.replace(moe, priority="position"),
        "moe.eval_transport=dropless": dataclasses.replace(moe, eval_transport="dropless"),
        f"moe.eval_capacity_factor={moe.num_experts}": dataclasses.replace(
            moe, eval_capacity_factor=float(moe.num_experts)
        ),
    }
    cures = [text for text, other in around.items() if not gate.visibility(other).eval_future]
    cause = (
        f" with moe.priority={moe.priority}, moe.eval_transport={moe.eval_transport} and "
        f"moe.eval_capacity_factor={moe.eval_capacity_factor:g}"
    )
    cause = cause if cures else ""
    others = gate.causal if isinstance(gate, HasCausalFields) else {}
    cures += [
        f"moe.gate.{field}={value}"
        for field, value in others.items()
        if not make_gate(config, **{field: value}).visibility(moe).eval_future
    ]
    cures += [f"moe.gate.name={gate.causal_gate}"] if isinstance(gate, HasCausalGate) else []
    raise UserError(
        f"moe.gate.name={config.moe.gate.name}{cause} lets a token see later "
        "tokens of its sequence in evaluation, so the loss would not be that of a language model; "
        f"use {', '.join(cures or ['a causal gate'])}, or moe.allow_future_leak=True to run it "
        "with its results marked"
    )


def _check_distributed(config: Config) -> None:
    given = config.distributed
    if given.mode != "explicit":
        for field, unset in (("coordinator", ""), ("num_processes", 0), ("process_id", -1)):
            if given[field] != unset:
                raise UserError(
                    f"distributed.{field}={given[field]} is used only with "
                    f"distributed.mode=explicit, and the mode is {given.mode}"
                )
        return
    host, _, port = given.coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(
            f"distributed.coordinator={given.coordinator!r} must be host:port of process 0 when "
            "distributed.mode=explicit"
        )
    if not 0 <= given.process_id < given.num_processes:
        raise UserError(
            f"distributed.process_id={given.process_id} must lie between 0 and "
            f"distributed.num_processes={given.num_processes} - 1 when distributed.mode=explicit"
        )


def _check_paths(config: Config) -> None:
    checks = {
        "data.path": (os.path.exists, "does not exist"),
        "data.tokenizer": (os.path.isfile, "is not a file"),
        "train.init_from": (
            lambda path: os.path.isfile(os.path.join(path, "config.json")),
            "is not the workdir of a run (it has no config.json)",
        ),
    }
    for name, (is_there, problem) in checks.items():
        path = get_field(config, name)
        if path and not is_there(os.path.expanduser(path)):
            raise UserError(f"{name}={path!r} {problem}")
