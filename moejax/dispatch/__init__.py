"""From a routing to the experts and back, on any mesh: the transports and their names.

A transport is a frozen dataclass such as ``Cells(capacity_factor=2.0)``; ``dispatch.api`` runs it.
Names exist at the edge only, in a config's fields and in the layer's arguments, and ``transports``
turns them into values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.dispatch.all_experts import AllExperts
from moejax.dispatch.cells import Cells
from moejax.dispatch.dropless import Dropless, DroplessOnce
from moejax.dispatch.gather import Gather
from moejax.types import Transport

TRANSPORTS: dict[str, type[Transport]] = {
    "cells": Cells,
    "dropless": Dropless,
    "dropless_once": DroplessOnce,
    "gather": Gather,
    "all_experts": AllExperts,
}
"""The transports by the names that configs use."""


def without_slots() -> list[str]:
    """Names of the transports that have room for every pair."""
    return [name for name, transport in TRANSPORTS.items() if transport().slot_rules is None]


def transports(flat: Mapping[str, Any]) -> tuple[Transport, Transport]:
    """The transports of training and of evaluation, by their names and options.

    ``flat`` holds ``transport`` and ``eval_transport``, as names or values, beside the options of
    those by name. An option goes to the fields of that name in both transports; evaluation takes
    the one with ``eval_`` before its name where there is one. Options are checked even if neither
    transport uses them.

    Raises:
      ValueError: naming the option, its value and the remedy.
    """
    return _transport(flat, ""), _transport(flat, "eval_")


def _transport(flat: Mapping[str, Any], prefix: str) -> Transport:
    given = flat[f"{prefix}transport"]
    if isinstance(given, Transport):
        return given
    if not isinstance(given, str) or given not in TRANSPORTS:
        raise ValueError(
            f"{prefix}transport={given!r} is unknown; use one of {', '.join(TRANSPORTS)}"
        )
    made = {name: _made(transport, flat, prefix) for name, transport in TRANSPORTS.items()}
    return made[given]


def _made(transport: type[Transport], flat: Mapping[str, Any], prefix: str) -> Transport:
    """A transport with the options that it has fields for."""
    names = {
        field.name: prefix + field.name if prefix + field.name in flat else field.name
        for field in dataclasses.fields(transport)
    }
    try:
        return transport(**{name: flat[own] for name, own in names.items() if own in flat})
    except ValueError as error:
        name, equals, rest = str(error).partition("=")
        raise ValueError(names.get(name, name) + equals + rest) from error


def check_options(given: Mapping[str, Any]) -> None:
    """Raises ValueError if an option would be ignored, as all transports it goes to are values.

    ``given``: as for ``transports``, None where an argument was not given.
    """
    for name, value in given.items():
        own = name.removeprefix("eval_")
        takers = ["eval_transport"] if own != name else ["transport", "eval_transport"]
        takers = ["transport"] if f"eval_{name}" in given else takers
        if own == "transport" or value is None:
            continue
        if all(isinstance(given.get(taker), Transport) for taker in takers):
            raise ValueError(
                f"{name}={value!r} belongs to a transport that is given by name, but "
                f"{takers[0]}={given[takers[0]]} is a value; set {own} in the value"
            )
