"""From the config to the values that the library takes: gate, layers' options, loss weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from moejax import gating
from moejax.config.table import names_of
from moejax.config.tree import Config, flatten
from moejax.errors import UserError
from moejax.options import (
    AttentionOptions,
    DepthsOptions,
    DispatchOptions,
    FFNOptions,
    HeadsOptions,
    LatentOptions,
    MoEOptions,
    Options,
    RopeOptions,
    StackOptions,
    renamed,
)
from moejax.types import Gate, MoEConfig

NESTED: dict[str, type[Options]] = {
    "attention": AttentionOptions,
    "latent": LatentOptions,
    "heads": HeadsOptions,
    "depths": DepthsOptions,
    "ffn": FFNOptions,
    "experts": MoEOptions,
}
"""The fields of ``StackOptions`` that are options themselves."""


Kind = TypeVar("Kind", bound=Options)
Model = TypeVar("Model", bound=StackOptions)


def stack_options(
    config: Config,
    model: type[Model] = StackOptions,
    *,
    attention: Mapping[str, Any] | None = None,
    experts: Mapping[str, Any] | None = None,
    **own: Any,
) -> Model:
    """The options of a model's layers.

    Args:
      model: the class of the model's options.
      attention: options of attention that the task decides, such as ``{"causal": False}``.
      experts: options of the MoE layers that the task decides, such as ``{"vocab_size": 256}``.
      own: fields that ``model`` has beyond those of the layers.

    Raises:
      UserError: options that do not fit each other; a gate that is unknown.
    """
    gate = make_gate(config)
    given = {
        "attention": attention or {},
        "experts": {"gate": gate, "config": moe_config(config), **(experts or {})},
    }
    given["attention"] = {"rope": options_of(config, RopeOptions), **given["attention"]}
    nested = {name: options_of(config, kind, given.get(name, {})) for name, kind in NESTED.items()}
    return options_of(config, model, {**nested, **own})


def options_of(config: Config, kind: type[Kind], given: Mapping[str, Any] | None = None) -> Kind:
    """Options with the values of the config, where it has the field, then ``given``.

    Raises:
      UserError: values that do not fit each other.
    """
    flat = flatten(config)
    known = {option: flat[name] for option, name in names_of(kind).items() if name in flat}
    try:
        return kind(**{**known, **(given or {})})
    except ValueError as error:
        raise UserError(in_config_words(config, kind, str(error))) from error


def in_config_words(config: Config, kind: type[Options], text: str) -> str:
    """A message of ``kind`` with the config's names of options and gate."""
    dotted = {
        f"{field}.{option}": name
        for field, nested in NESTED.items()
        for option, name in names_of(nested).items()
    }
    # A check of attention or of the experts that the stack makes has no dots.
    kinds = (LatentOptions, MoEOptions, RopeOptions, AttentionOptions, StackOptions)
    plain = {option: name for kind in kinds for option, name in names_of(kind).items()}
    names = {**dotted, **plain, **names_of(kind)}
    text = renamed(text, names)
    own = f"gate {type(make_gate(config)).__name__} "
    return text.replace(own, f"moe.gate.name={config.moe.gate.name} ")


def moe_config(config: Config, **changes: Any) -> MoEConfig:
    """The choices around the gate, as the layer takes them, with ``changes`` to the fields.

    Raises:
      UserError: a choice that does not exist.
    """
    names = [field.name for field in dataclasses.fields(DispatchOptions)]
    try:
        known = {name: config.moe[name] for name in names if name in config.moe}
        return DispatchOptions(**{**known, **changes}).config
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
        raise UserError(gate_message(name, error)) from error


def gate_message(name: str, error: ValueError) -> str:
    """A gate's refusal in words of the config: ``gate.k`` and ``num_experts`` are below ``moe``."""
    text = " ".join(str(error).split())
    return f"moe.{text}" if text.startswith(("gate.", "num_experts")) else f"gate {name!r}: {text}"


def loss_weights(config: Config) -> tuple[tuple[str, float], ...]:
    """The weights of auxiliary losses, as ``Task`` takes them."""
    return tuple(sorted(config.moe.losses.items()))
