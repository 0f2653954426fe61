"""A field of the config: its default, what it means, and the values it may take."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

WHOLE = 2**31 - 1
"""The largest whole number of a field that states no other: step counters and arrays are int32."""
CPU_DEVICES = 1024
"""The most virtual CPU devices of a process. So many start in 4 s and take 0.3 GB; ten thousand
start in minutes, and a million take all of a machine's memory."""
TINY, HUGE = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))
"""The smallest and the largest number above 0 that arithmetic in float32 has."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A config field. ``low`` and ``high`` are allowed themselves, ``above`` and ``below`` not.

    ``before``: what a run had that was written before there was the field, or before it had this
    default; None: the default.
    ``may_change``: a run may go on with another value of it.
    """

    default: Any
    comment: str
    choices: Collection[str] = ()
    low: int | float | None = None
    above: int | float | None = None
    high: int | float | None = None
    below: int | float | None = None
    before: Any = None
    may_change: bool = False

    @property
    def type(self) -> type:
        return type(self.default)

    @property
    def range(self) -> str:
        """The allowed values in words; empty when every value of the type is."""
        if self.choices:
            return " | ".join(self.choices)
        low = f">= {_shown(self.low)}" if self.low is not None else ""
        low = f"> {_shown(self.above)}" if self.above is not None else low
        high = f"<= {_shown(self.high)}" if self.high is not None else ""
        high = f"< {_shown(self.below)}" if self.below is not None else high
        return " and ".join(part for part in (low, high) if part)

    def beyond(self, value: Any) -> str:
        """What a number of the right type is too large or too small for; empty if it is neither."""
        if isinstance(value, tuple):
            return next(filter(None, map(self.beyond, value)), "")
        if type(value) is int and self.high is None and abs(value) > WHOLE:
            return f"at most {WHOLE}, the largest whole number of int32"
        if isinstance(value, float) and abs(value) > HUGE:
            return f"at most {HUGE:.2g}, the largest number of float32"
        if isinstance(value, float) and 0 < abs(value) < TINY:
            return f"0 or at least {TINY:.2g}, the smallest number of float32"
        return ""

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is a choice or within the range."""
        if self.choices:
            return value in self.choices
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


def _shown(bound: int | float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
