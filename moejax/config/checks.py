"""Checks of a config before anything is compiled or written.

Every mistake is one line with the field, the numbers that do not fit and what to change. Checks of
the layers alone are in their options (``moejax.options``); those here involve the mesh, the batch
and the data.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

from moejax.config import mixture
from moejax.config.build import gate_message, make_gate, moe_config, stack_options
from moejax.config.saved import holds_run
from moejax.config.tasks import task_entry
from moejax.config.tree import Config, get_field, table_of
from moejax.dispatch import without_slots
from moejax.errors import UserError, suggest
from moejax.mesh import AXES, BATCH_AXES, resolve_shape
from moejax.options import RopeOptions
from moejax.types import Gate, GateTraits, MoEConfig, Visibility

HUB = "hf://"
"""Begins a path that names a data set of the library `datasets`."""


def validate(config: Config, num_devices: int | None = None) -> Visibility:
    """Checks everything that can be known without starting devices.

    With ``num_devices`` (all processes together), also checks that the mesh fits them. A mesh axis
    of -1 is then filled; without, it counts as small as possible.

    Returns the visibility of tokens, for the marks on results.

    Raises:
      UserError: the first mistake.
    """
    _check_ranges(config)
    mesh = resolve_shape({axis: config.mesh[axis] for axis in AXES}, num_devices)
    visibility, stack = Visibility(), None
    if "num_layers" in config.model:
        # A task without this field has no rotary positions, and heads of any width.
        fixed = {} if "rope_theta" in config.model else {"rope": RopeOptions(theta=None)}
        stack = stack_options(config, attention=fixed)
        visibility = stack.depths.visibility
        _check_sharding(config, mesh)
    _check_batch(config, mesh)
    check_distributed(config)
    _check_paths(config)
    _check_mixture(config)
    if not has_experts(config) and config.moe.get("replay"):
        raise UserError(
            f"moe.replay={config.moe.replay!r}: a dense model (moe.every=0) routes nothing; use "
            "moe.replay="
        )
    if has_experts(config):
        gate = stack.gate if stack else make_gate(config)
        moe = stack.moe if stack else moe_config(config)
        _check_moe(config, mesh, gate, moe)
        visibility = visibility.union(_check_visibility(config, gate, moe))
    _check_packing(config, gate if has_experts(config) else None)
    if not is_causal(config):
        # Training may use the whole batch; a prediction should not depend on its other rows.
        return Visibility(eval_others=visibility.eval_others)
    return visibility


def is_causal(config: Config) -> bool:
    """True if the task predicts from earlier tokens; otherwise no token counts as future."""
    return "allow_future_leak" in config.moe


def has_experts(config: Config) -> bool:
    """True if the model has MoE layers."""
    return bool(config.moe.get("every", 1))


def _check_ranges(config: Config) -> None:
    for name, field in table_of(config).items():
        value = get_field(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} must be a finite number")
        if beyond := field.beyond(value):
            raise UserError(f"{name}={value} must be {beyond}; default {field.default}")
        if field.allows(value):
            continue
        if field.choices:
            raise UserError(f"{name}={value!r} is unknown; {suggest(str(value), field.choices)}")
        raise UserError(f"{name}={value} must be {field.range}; default {field.default}")


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


def _check_sharding(config: Config, mesh: Mapping[str, int]) -> None:
    """Checks that the sizes of the layers divide over the mesh."""
    moe = config.moe
    divides(config, "model.d_model", mesh, "fsdp")
    divides(config, "model.num_heads", mesh, "tensor")
    divides(config, "model.num_kv_heads", mesh, "tensor")
    if moe.every != 1 or moe.first_dense:
        divides(config, "model.d_ff", mesh, "tensor")
    if moe.every:
        divides(config, "moe.num_experts", mesh, "expert")
        divides(config, "moe.d_ff", mesh, "tensor")


def divides(config: Config, name: str, mesh: Mapping[str, int], axis: str) -> None:
    """Raises UserError unless a field that is sharded over a mesh axis is a multiple of it."""
    value, size = get_field(config, name), mesh[axis]
    if value % size:
        near = sorted({max(value // size, 1) * size, (value // size + 1) * size})
        raise UserError(
            f"{name}={value} is not a multiple of mesh.{axis}={size}; use {name}="
            f"{' or '.join(map(str, near))}, or a mesh.{axis} that divides {value}"
        )


def _check_moe(config: Config, mesh: Mapping[str, int], gate: Gate, choices: MoEConfig) -> None:
    moe = config.moe
    try:
        gate.check(moe.num_experts, train=True)
    except ValueError as error:
        raise UserError(gate_message(moe.gate.name, error)) from error
    if moe.get("replay") and not GateTraits.of(gate).follows:
        raise UserError(
            f"moe.replay={moe.replay!r}: moe.gate.name={moe.gate.name} has no weights for experts "
            "that it did not choose; use top_k, loss_free or a preset of them, or moe.replay="
        )
    _check_groups(config, choices, mesh, gate)
    for field in ("group", "balance_scope"):
        if moe.get(field) == "batch" and config.train.grad_accum > 1:
            raise UserError(
                f"moe.{field}=batch needs the whole batch at once, but train.grad_accum="
                f"{config.train.grad_accum} splits it; use train.grad_accum=1 or "
                f"moe.{field}=sequence"
            )


def _check_groups(config: Config, choices: MoEConfig, mesh: Mapping[str, int], gate: Gate) -> None:
    cause, cure = _slots_of_groups(config, gate)
    if choices.group == "batch" and cause:
        raise UserError(
            f"moe.group=batch does not go with {cause}, whose slots are on one device; use {cure}"
        )
    accum, per_row = config.train.grad_accum, task_entry(config.task.name).sequences_per_row
    sequences = config.train.batch_size // accum * per_row
    rows = choices.rows_per_group(sequences)

    def fitting(unit: int) -> int:
        """The next batch size whose sequences are a multiple of ``unit`` in each part."""
        unit = math.lcm(unit, per_row)
        return math.ceil(sequences / unit) * unit // per_row * accum

    if sequences % rows:
        each = f" x {per_row}" if per_row > 1 else ""
        raise UserError(
            f"train.batch_size / train.grad_accum{each} = {sequences} sequences are not a multiple "
            f"of moe.group={choices.group}; use train.batch_size={fitting(rows)}"
        )
    least = GateTraits.of(gate).least_rows(choices.num_experts)
    if rows < least:
        raise UserError(
            f"moe.gate.name={config.moe.gate.name} chooses among the sequences of a group, with "
            f"these fields at least {least}, but moe.group={choices.group} has {rows}; use "
            f"moe.group={least} or more"
        )
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    if cause and (sequences // rows) % shards:
        raise UserError(
            f"moe.group={choices.group} makes {sequences // rows} groups of a batch of {sequences} "
            f"sequences, not a multiple of mesh.data x mesh.fsdp x mesh.expert = {shards}; use "
            f"train.batch_size={fitting(rows * shards)} or {cure}"
        )


def _slots_of_groups(config: Config, gate: Gate) -> tuple[str, str]:
    """The choice that needs a group's slots on one device, and the remedy; empty without one."""
    mixes = GateTraits.of(gate).mixes
    if mixes == "slots":
        return f"moe.gate.name={config.moe.gate.name}", "moe.group=sequence"
    first, *others = without_slots()
    for field in ("transport", "eval_transport"):
        name = config.moe.get(field)
        if name is not None and name not in (first, *others) and not mixes:
            return f"moe.{field}={name}", f"moe.{field}={first} (or {', '.join(others)})"
    return "", ""


def _check_packing(config: Config, gate: Gate | None) -> None:
    """Refuses packed rows where documents of a row would not be computed as if alone."""
    packing = config.data.get("packing", "none")
    if packing == "none":
        return
    around = "or data.packing=none"
    if gate is not None:
        traits, name = GateTraits.of(gate), config.moe.gate.name
        if traits.mixes:
            raise UserError(
                f"data.packing={packing}: moe.gate.name={name} mixes {traits.mixes} over whole "
                "rows, which would hold several documents; use a gate that keeps them apart, such "
                f"as top_k or sentence, {around}"
            )
        if traits.check_rows is not None:
            raise UserError(
                f"data.packing={packing}: moe.gate.name={name} routes rows as they were recorded, "
                f"one text in each; use moe.replay with a gate that follows, {around}"
            )
    if 0 < config.model.get("mod_capacity", 0.0) < 1:
        raise UserError(
            f"data.packing={packing}: model.mod_capacity={config.model.mod_capacity:g} chooses "
            "among the tokens of a row, where documents would compete; use "
            f"model.mod_capacity=0 {around}"
        )


def _check_visibility(config: Config, gate: Gate, moe: MoEConfig) -> Visibility:
    """Refuses a language model whose evaluation would see the tokens it predicts."""
    visibility = gate.visibility(moe)
    if not (visibility.eval_future and is_causal(config)) or config.moe.allow_future_leak:
        return visibility
    roomy = without_slots()[0]
    around = {
        "moe.priority=position": moe_config(config, priority="position"),
        f"moe.eval_transport={roomy}": moe_config(config, eval_transport=roomy),
        f"moe.eval_capacity_factor={moe.num_experts}": moe_config(
            config, eval_capacity_factor=float(moe.num_experts)
        ),
    }
    cures = [text for text, other in around.items() if not gate.visibility(other).eval_future]
    flat = config.moe
    cause = (
        f" with moe.priority={flat.priority}, moe.eval_transport={flat.eval_transport} and "
        f"moe.eval_capacity_factor={flat.eval_capacity_factor:g}"
    )
    cause = cause if cures else ""
    traits = GateTraits.of(gate)
    cures += [
        f"moe.gate.{field}={value}"
        for field, value in traits.causal_fields.items()
        if not make_gate(config, **{field: value}).visibility(moe).eval_future
    ]
    cures += [f"moe.gate.name={traits.causal_gate}"] if traits.causal_gate else []
    raise UserError(
        f"moe.gate.name={config.moe.gate.name}{cause} lets a token see later "
        "tokens of its sequence in evaluation, so the loss would not be that of a language model; "
        f"use {', '.join(cures or ['a causal gate'])}, or moe.allow_future_leak=True to run it "
        "with its results marked"
    )


def check_distributed(config: Config) -> None:
    """Refuses fields of ``distributed`` that name no place among processes.

    Raises:
      UserError: naming the field.
    """
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


def _check_mixture(config: Config) -> None:
    """Refuses a mixture that cannot be read, and fields that do not go with one."""
    text = config.data.get("mixture", "")
    if not text:
        return
    parts = mixture.parts_of(text)
    for name in ("data.path", "data.eval_path"):
        if value := get_field(config, name):
            raise UserError(
                f"{name}={value!r} and {mixture.FIELD}={text!r} both name the data; leave one of "
                "them empty (each source of a mixture has a held-out part of its own)"
            )
    for part in parts:
        if part.path.startswith(HUB):
            raise UserError(
                f"{mixture.FIELD}={text!r}: {part.name!r} is a data set of the hub, which is read "
                "while it is trained on; save it as files and name their folder"
            )
        if not _is_named(os.path.expanduser(part.path)):
            raise UserError(f"{mixture.FIELD}={text!r}: {part.path!r} does not exist")
    if config.data.stream:
        raise UserError(
            f"data.stream=True does not go with {mixture.FIELD}={text!r}; prepare each source "
            "(moejax data prepare), name the folders of shards in it and use data.stream=False"
        )
    if config.moe.replay:
        raise UserError(
            f"moe.replay={config.moe.replay!r} holds experts for the rows of one text, and "
            f"{mixture.FIELD}={text!r} has several; use moe.replay= or data.path"
        )
    if config.train.eval_rows < len(parts):
        raise UserError(
            f"train.eval_rows={config.train.eval_rows} is less than one row for each of the "
            f"{len(parts)} sources of {mixture.FIELD}; use {len(parts)} or more"
        )


def _is_named(path: str) -> bool:
    """True if data may be at a path: those who read lists, globs and the hub find out."""
    return os.path.exists(path) or path.startswith(HUB) or any(mark in path for mark in ",*?[")


def _check_paths(config: Config) -> None:
    checks = {
        "data.path": (_is_named, "does not exist"),
        "data.tokenizer": (os.path.exists, "does not exist"),
        "data.eval_path": (_is_named, "does not exist"),
        "moe.replay": (os.path.isfile, "is not a file"),
        "train.init_from": (
            lambda path: holds_run(Path(path)),
            "is not the workdir of a run (it has no config.json)",
        ),
    }
    for name, (is_there, problem) in checks.items():
        section, _, leaf = name.partition(".")
        path = config[section].get(leaf, "")
        if path and not is_there(os.path.expanduser(path)):
            raise UserError(f"{name}={path!r} {problem}")
