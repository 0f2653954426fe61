"""Between our config and a family's fields, and the family that can express a model of ours."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moejax.config import Config, default, make_gate, set_gate
from moejax.config.tree import flatten, set_field
from moejax.errors import UserError
from moejax.gating.registry import GATES
from moejax.hf.families import FAMILIES, Family
from moejax.hf.keys import Fields, Theirs, same_numbers, sparse_of

OF_TRAINING = {"init_scale", "jitter", "sequence_loss", "device_loss", "bias_rate"}
"""A gate's hyper-parameters that do not change what it does in evaluation."""

OF_THE_RUN = {
    "model.dtype",
    "model.matmul_precision",
    "model.remat",
    "model.attention",
    "model.rope_long",
    "moe.transport",
    "moe.capacity_factor",
    "moe.eval_transport",
    "moe.eval_capacity_factor",
    "moe.priority",
    "moe.reroute",
    "moe.group",
    "moe.balance_scope",
    "moe.allow_future_leak",
}
"""Fields that do not change what a model computes, if no pair is dropped. Published code takes
``model.rope_long`` from the length of a sequence."""

UNUSED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("model.window", 0, ("model.window_kind",)),
    ("model.temperature", 0.0, ("model.temperature_length",)),
    ("model.qk_norm", "none", ("model.qk_norm_eps",)),
    ("model.moa_experts", 0, ("model.moa_k",)),
    ("model.mod_capacity", 0.0, ("model.mod_every", "model.mod_predictor")),
    ("moe.shared_experts", 0, ("moe.shared_d_ff",)),
)
"""Fields without meaning where another has this value."""

OF_SCALING = {
    "none": (),
    "linear": ("_factor",),
    "llama3": ("_factor", "trained_length", "low_turns", "high_turns"),
}
"""Fields of rotary positions that these scalings use, by the ends of their names."""

_DEFAULTS = flatten(default())

Changes = Mapping[str, tuple[Any, Any]]
"""Fields by name: the value wanted, and the value that a family has instead."""


def config_of(fields: Fields) -> Config:
    """A config of a language model with these fields.

    Raises:
      UserError: a value that a field of ours cannot have.
    """
    config = default()
    gate = dict(fields.get("moe.gate", {}))
    if gate:
        set_gate(config, gate.pop("name"))
    values = {**{f"moe.gate.{name}": value for name, value in gate.items()}, **fields}
    values.pop("moe.gate", None)
    for name, value in values.items():
        try:
            set_field(config, name, value)
        except TypeError as error:
            raise UserError(f"{name}={value!r} cannot be set ({error})") from error
    return config


def fields_of(config: Config) -> Fields:
    """The fields of a config that decide what the model computes, in one form for each model."""
    flat = flatten(config)
    fields = {
        name: value
        for name, value in flat.items()
        if name.startswith(("model.", "moe.")) and not name.startswith("moe.gate.")
    }
    gate = make_gate(config)
    names = [
        name for name, entry in GATES.items() if entry.target.endswith(f":{type(gate).__name__}")
    ]
    known = dataclasses.asdict(gate) if dataclasses.is_dataclass(gate) else {}
    fields["moe.gate"] = {"name": (names or [config.moe.gate.name])[0], **known}
    return explicit(fields)


def explicit(fields: Fields) -> Fields:
    """The same fields with 0 replaced by what it stands for, and unused ones at their defaults."""
    f = {**_DEFAULTS, **fields}
    f = {n: v for n, v in f.items() if n.startswith(("model.", "moe.")) and "moe.gate." not in n}
    width = f["model.head_dim"] or f["model.d_model"] // f["model.num_heads"]
    f["model.head_dim"] = width
    latent = f["model.mla_kv_rank"]
    if latent:
        f["model.num_kv_heads"] = f["model.num_heads"]
        f["model.head_dim"] = width = f["model.mla_plain_width"] + f["model.mla_rope_width"]
    f["model.attention_scale"] = f["model.attention_scale"] or width**-0.5
    f["model.embed_scale"] = f["model.embed_scale"] or math.sqrt(f["model.d_model"])
    if f["moe.shared_experts"]:
        f["moe.shared_d_ff"] = f["moe.shared_d_ff"] or f["moe.shared_experts"] * f["moe.d_ff"]
        f["moe.shared_experts"] = 1
    _explicit_magnitudes(f)
    if not f["model.global_every"]:
        f["model.global_rope"] = True
    elif not f["model.window"] and f["model.global_rope"]:
        f["model.global_every"] = 0
    if not sparse_of(f):
        f["moe.gate"], f["moe.every"] = {"name": "top_k"}, 0
    return {**f, **{name: _DEFAULTS[name] for name in _unused(f)}}


def _explicit_magnitudes(f: Fields) -> None:
    if f["model.rope_scaling"] == "yarn":
        grown = 0.1 * math.log(f["model.rope_factor"]) + 1.0
        f["model.rope_magnitude"] = f["model.rope_magnitude"] or grown
    if f["model.rope_scaling"] == "longrope":
        ratio = math.log(f["model.rope_factor"]) / math.log(f["model.rope_trained_length"])
        f["model.rope_magnitude"] = f["model.rope_magnitude"] or math.sqrt(1.0 + ratio)
        f["model.rope_long_magnitude"] = f["model.rope_long_magnitude"] or f["model.rope_magnitude"]
        f["model.rope_short_factors"] = same_numbers(f["model.rope_short_factors"])
        f["model.rope_long_factors"] = same_numbers(f["model.rope_long_factors"])


def _unused(f: Fields) -> set[str]:
    """The fields without meaning for this model."""
    unused = {n for field, value, names in UNUSED if f[field] == value for n in names}
    if f["model.mla_kv_rank"]:
        unused -= {"model.qk_norm_eps"}
    else:
        unused |= {n for n in f if n.startswith("model.mla_")}
    if f["model.rope_scaling"] in OF_SCALING:
        kept = ("theta", "share", "interleaved", "scaling", *OF_SCALING[f["model.rope_scaling"]])
        unused |= {n for n in f if n.startswith("model.rope_") and not n.endswith(kept)}
    sparse = sparse_of(f)
    if len(sparse) == f["model.num_layers"]:
        unused |= {"model.d_ff", "model.activation"}
    if not sparse:
        unused |= {n for n in f if n.startswith("moe.")} - {"moe.every", "moe.gate"}
    return unused


def differences(wanted: Fields, found: Fields) -> dict[str, tuple[Any, Any]]:
    """The fields in which two models (from ``explicit``) compute something else."""
    changes: dict[str, tuple[Any, Any]] = {}
    layers = {"moe.every", "moe.first_dense", "moe.dense_layers"}
    for name, value in wanted.items():
        of_run = name in OF_THE_RUN or name.startswith("moe.losses.")
        if of_run or name in layers or name == "moe.gate" or found[name] == value:
            continue
        if isinstance(value, float) and math.isclose(value, found[name], rel_tol=1e-12):
            continue
        changes[name] = value, found[name]
    if sparse_of(wanted) != sparse_of(found):
        name = next((n for n in layers if wanted[n] != found[n]), "moe.every")
        changes[name] = wanted[name], found[name]
    ours, theirs = wanted["moe.gate"], found["moe.gate"]
    for name in ours:
        if name in theirs and name not in OF_TRAINING and ours[name] != theirs[name]:
            changes[f"moe.gate.{name}"] = ours[name], theirs[name]
    return changes


def written(family: Family, fields: Fields) -> tuple[dict[str, Any], Changes]:
    """A family's config for a model of ours, and the fields that it cannot express."""
    try:
        keys = family.write(fields)
        found = family.read(Theirs(keys, "config.json"))
    except (KeyError, ZeroDivisionError, ValueError, UserError) as error:
        reason = " ".join(str(error).split())
        return {}, {"moe.gate.name": (fields["moe.gate"]["name"], reason)}
    return keys, differences(fields, explicit(found))


def family_for(fields: Fields, preferred: str = "") -> tuple[Family, dict[str, Any]]:
    """The first family that can express a model of ours, and its config.

    ``preferred``: the model type to try first.

    Raises:
      UserError: there is none; naming the option that the nearest family does not have.
    """
    known = [family for family in FAMILIES if family.writes]
    order = sorted(known, key=lambda family: family.model_type != preferred)
    fits = [(family, *written(family, fields)) for family in order]
    for family, keys, changes in fits:
        if not changes:
            return family, keys
    family, _, changes = min(fits, key=lambda fit: len(fit[2]) + 100 * (not fit[1]))
    name, (value, instead) = next(iter(changes.items()))
    raise UserError(
        f"{name}={_shown(value)} cannot be expressed by a published family; the nearest, "
        f"{family.model_type}, has {name}={_shown(instead)}"
        + (f" (and {len(changes) - 1} more fields differ)" if len(changes) > 1 else "")
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
