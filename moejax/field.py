"""A field of the config: its default, what it means, and the values it may take."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """A config field. ``low`` and ``high`` are allowed themselves, ``above`` and ``below`` not.

    ``before``: what a run had that was written before there was the field; None: the default.
    ``may_change``: a run may go on with another value of it.
    """

    default: Any
    comment: str
    choices: tuple[str, ...] = ()
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
        low = f">= {self.low:g}" if self.low is not None else ""
        low = f"> {self.above:g}" if self.above is not None else low
        high = f"<= {self.high:g}" if self.high is not None else ""
        high = f"< {self.below:g}" if self.below is not None else high
        return " and ".join(part for part in (low, high) if part)

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
