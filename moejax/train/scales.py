"""The range of an axis in every picture: never so small that a small difference looks large.

An axis that follows its data alone spreads two runs 0.004 nats apart over the height of a figure.
Here each quantity has a least span, a difference worth seeing; docs/report.md lists them.
"""

import math
from collections.abc import Iterable

NATS = 0.05
"""The least span of a loss in nats: several times the effect of another seed in a small run."""
RELATIVE = 0.05
"""The least span of any other quantity, relative to its largest value."""
SHARE = 0.05
"""The least span of a share: of dropped pairs, of right predictions."""
IMBALANCE = 0.5
"""The least span of max load / mean load - 1."""
MARGIN = 0.06
"""Margin beyond the values at a free end, relative to their range."""
LOAD_OCTAVES = 2
"""Colours of a load over the mean load end at 1/4 and 4 in every picture."""

Ends = tuple[float, float]
EVERYWHERE: Ends = (-math.inf, math.inf)


def span(
    values: Iterable[float], least: float, start: float | None = None, bounds: Ends = EVERYWHERE
) -> Ends:
    """The ends of an axis that shows all finite ``values`` and is at least ``least`` wide.

    ``start``: the beginning of the axis, such as 0; values below it are not shown. ``bounds``: the
    possible range of the quantity; the axis stays inside.
    """
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    low, high = min(known, default=start or 0.0), max(known, default=start or 0.0)
    if start is not None:
        low, high = start, max(high, start)
    free = 2 if start is None else 1
    room = max(MARGIN * (high - low), (least - (high - low)) / free)
    low, high = low - room * (free == 2), high + room
    if low < bounds[0]:
        low, high = bounds[0], high + bounds[0] - low
    if high > bounds[1]:
        low, high = max(bounds[0], low - (high - bounds[1])), bounds[1]
    return low, high


def least_loss(unit: str, values: Iterable[float]) -> float:
    """The least span of losses in a unit: ``NATS`` for nats, otherwise by the largest value."""
    return NATS if unit.startswith("nats") else least_relative(values)


def least_relative(values: Iterable[float]) -> float:
    """``RELATIVE`` times the largest finite magnitude; 1 if there is none, or it is 0."""
    known = [abs(float(value)) for value in values if value is not None and math.isfinite(value)]
    return RELATIVE * max(known, default=0.0) or 1.0
