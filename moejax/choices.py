"""The choices around a gate, and what they let a token see. Needs nothing."""

import dataclasses
import math
import numbers
from typing import NamedTuple

Priority = str
"""Who keeps a slot of a full expert: one of ``PRIORITIES``."""
Transport = str
"""How tokens travel to their experts: one of ``TRANSPORTS``."""

TRANSPORTS: tuple[str, ...] = ("cells", "dropless", "dropless_once", "gather", "all_experts")
PRIORITIES: tuple[str, ...] = ("position", "choice", "gate", "random")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The choices around a gate that decide what a token's output may depend on."""

    num_experts: int
    transport: Transport = "cells"
    capacity_factor: float = 1.25
    eval_transport: Transport = "dropless"
    eval_capacity_factor: float = 1.25
    priority: Priority = "position"
    group: str = "sequence"
    reroute: int = 0

    def __post_init__(self) -> None:
        for field, value, valid in (
            ("transport", self.transport, TRANSPORTS),
            ("eval_transport", self.eval_transport, TRANSPORTS),
            ("priority", self.priority, PRIORITIES),
        ):
            if value not in valid:
                raise ValueError(f"{field}={value!r} is unknown; use one of {', '.join(valid)}")
        if self.group not in ("sequence", "batch") and not (
            self.group.isdecimal() and int(self.group) > 0
        ):
            raise ValueError(
                f"group={self.group!r} is unknown; use 'sequence', 'batch' or a whole number of "
                "sequences such as '4'"
            )
        if self.reroute < 0:
            raise ValueError(f"reroute={self.reroute} must be 0 (off) or a number of rounds")
        for field, value in (
            ("num_experts", self.num_experts),
            ("capacity_factor", self.capacity_factor),
            ("eval_capacity_factor", self.eval_capacity_factor),
        ):
            if not (isinstance(value, numbers.Real) and value > 0 and math.isfinite(value)):
                raise ValueError(f"{field}={value!r} must be a finite number above 0")

    def rows_per_group(self, batch: int) -> int:
        """Sequences in one routing group, for a batch of ``batch`` sequences."""
        if self.group == "batch":
            return batch
        return 1 if self.group == "sequence" else int(self.group)


class Visibility(NamedTuple):
    """What a token's output may depend on besides its own sequence up to itself.

    ``future``: later tokens of its own sequence. ``others``: other sequences of the batch.
    """

    train_future: bool = False
    train_others: bool = False
    eval_future: bool = False
    eval_others: bool = False

    @property
    def mark(self) -> str:
        """The mark that metrics, tables and figures carry; empty when nothing leaks."""
        parts = []
        for phase in ("train", "eval"):
            seen = [w for w in ("future", "others") if getattr(self, f"{phase}_{w}")]
            if seen:
                parts.append(f"{phase}:{'+'.join(seen)}")
        return " ".join(parts)

    def union(self, other: "Visibility") -> "Visibility":
        """Sees whatever either of the two sees."""
        return Visibility(*(a or b for a, b in zip(self, other, strict=True)))
