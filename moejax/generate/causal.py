"""The way in which a gate's text is decoded, or the reason why it cannot be."""

import dataclasses
from typing import Literal

from moejax.dispatch.few import Few
from moejax.errors import UserError
from moejax.options import StackOptions
from moejax.types import GateTraits

Way = Literal["memory", "prefix"]
"""``memory``: a step reads the new token and remembers the others' keys and values. ``prefix``: a
step reads the whole text again."""


def way_of(options: StackOptions) -> Way:
    """The way to decode a model with these layers.

    Raises:
      UserError: its gate sees later tokens or other texts, or routes recorded rows alone.
    """
    if not options.num_moe_layers:
        return "memory"
    gate, traits = options.gate, GateTraits.of(options.gate)
    moe = dataclasses.replace(options.moe, transport=Few(), eval_transport=Few())
    seen, name = gate.visibility(moe), type(gate).__name__
    if traits.check_rows is not None:
        raise UserError(
            f"gate {name} routes the rows that it was recorded for, and a text that is generated "
            "is none of them; use the gate of the recorded run, --config.moe.gate.name=..."
        )
    if seen.eval_future:
        cure = f"--config.moe.gate.name={traits.causal_gate}" if traits.causal_gate else ""
        fields = " ".join(f"--config.moe.gate.{k}={v}" for k, v in traits.causal_fields.items())
        remedy = cure or fields
        raise UserError(
            f"gate {name} routes a token by later ones, which are not there yet while a text is "
            f"generated; {f'use {remedy}' if remedy else 'train with a causal gate'}"
        )
    if seen.eval_others:
        raise UserError(
            f"gate {name} routes a token by the other texts of its batch, so that a text would "
            "depend on what is generated beside it; train with a gate that routes each text alone"
        )
    return "memory" if traits.routes_alone else "prefix"


def for_decoding(options: StackOptions) -> StackOptions:
    """The same layers for texts that do not depend on each other: every pair has room."""
    if not options.num_moe_layers:
        return options
    moe = dataclasses.replace(options.moe, transport=Few(), eval_transport=Few(), group="sequence")
    return options.with_experts(config=moe)
