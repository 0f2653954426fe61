"""From a routing to the experts and back, on any mesh: the transports and their names.

A transport is a frozen dataclass such as ``Cells(capacity_factor=2.0)``; ``dispatch.api`` runs it.
Names exist at the edge only, in a config's fields and in the layer's arguments, and
``FlatMoEConfig`` turns them into values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.dispatch.all_experts import AllExperts
from moejax.dispatch.cells import Cells
from moejax.dispatch.dropless import Dropless, DroplessOnce
from moejax.dispatch.gather import Gather
from moejax.types import MoEConfig, Priority, Transport

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


@dataclasses.dataclass(frozen=True)
class FlatMoEConfig:
    """``MoEConfig`` with transports by name and their options beside them, and the defaults.

    An option goes to the fields of that name in both transports, but each transport has its own
    capacity factor. Options are checked even where no transport uses them.
    """

    num_experts: int
    transport: Transport | str = "cells"
    capacity_factor: float = Cells.capacity_factor
    eval_transport: Transport | str = "dropless"
    eval_capacity_factor: float = Cells.capacity_factor
    priority: Priority = Cells.priority
    reroute: int = Cells.reroute
    group: str = MoEConfig.group

    def resolve(self) -> MoEConfig:
        """The same with transports as values.

        Raises:
          ValueError: naming the field, its value and the remedy.
        """
        transport, eval_transport = self._transport(""), self._transport("eval_")
        return MoEConfig(self.num_experts, transport, eval_transport, self.group)

    def _transport(self, prefix: str) -> Transport:
        given = getattr(self, f"{prefix}transport")
        if isinstance(given, Transport):
            return given
        if not isinstance(given, str) or given not in TRANSPORTS:
            raise ValueError(
                f"{prefix}transport={given!r} is unknown; use one of {', '.join(TRANSPORTS)}"
            )
        made = {name: self._made(transport, prefix) for name, transport in TRANSPORTS.items()}
        return made[given]

    def _made(self, transport: type[Transport], prefix: str) -> Transport:
        """A transport with the options that it has fields for."""
        flat = vars(self)
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

    ``given``: arguments by the names of ``FlatMoEConfig``, None where none was given.
    """
    names = [field.name for field in dataclasses.fields(FlatMoEConfig)]
    for name in names:
        own = name.removeprefix("eval_")
        takers = ["eval_transport"] if own != name else ["transport", "eval_transport"]
        takers = ["transport"] if f"eval_{name}" in names else takers
        if own in ("num_experts", "transport", "group") or given.get(name) is None:
            continue
        if all(isinstance(given.get(taker), Transport) for taker in takers):
            raise ValueError(
                f"{name}={given[name]!r} belongs to a transport that is given by name, but "
                f"{takers[0]}={given[takers[0]]} is a value; set {own} in the value"
            )
