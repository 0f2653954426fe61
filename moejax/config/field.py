"""A field of the config: its default, its meaning, and the values it may take."""

import dataclasses
from typing import Any

import numpy as np

from moejax.options import Range

WHOLE = 2**31 - 1
"""The largest whole number of a field that states no other: step counters and arrays are int32."""
CPU_DEVICES = 1024
"""The most virtual CPU devices of a process. So many start in 4 s and take 0.3 GB; ten thousand
start in minutes, and a million take all of a machine's memory."""
TINY, HUGE = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))
"""The smallest and the largest number above 0 that arithmetic in float32 has."""


@dataclasses.dataclass(frozen=True)
class Field(Range):
    """A config field, with its range (``Range``).

    ``before``: the value of runs from before the field existed, or had this default; None: the
    default. ``may_change``: a run may resume with another value.
    """

    default: Any
    comment: str
    before: Any = dataclasses.field(default=None, kw_only=True)
    may_change: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def type(self) -> type:
        return type(self.default)

    def beyond(self, value: Any) -> str:
        """The bound that a number of the right type exceeds; empty where it is representable."""
        if isinstance(value, tuple):
            return next(filter(None, map(self.beyond, value)), "")
        if type(value) is int and self.high is None and abs(value) > WHOLE:
            return f"at most {WHOLE}, the largest whole number of int32"
        if isinstance(value, float) and abs(value) > HUGE:
            return f"at most {HUGE:.2g}, the largest number of float32"
        if isinstance(value, float) and 0 < abs(value) < TINY:
            return f"0 or at least {TINY:.2g}, the smallest number of float32"
        return ""
