"""The gate that a config names, and the choices around it."""

import dataclasses
from typing import Any

from moejax import gating
from moejax.config.tree import Config
from moejax.dispatch import FlatMoEConfig
from moejax.errors import UserError
from moejax.types import Gate, MoEConfig


def moe_config(config: Config, **changes: Any) -> MoEConfig:
    """The choices around the gate with transports as values, after ``changes`` to the fields.

    Raises:
      UserError: a choice that does not exist.
    """
    moe = config.moe
    try:
        known = {f.name: moe[f.name] for f in dataclasses.fields(FlatMoEConfig) if f.name in moe}
        return FlatMoEConfig(**{**known, **changes}).resolve()
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
