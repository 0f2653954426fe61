"""Where a name fits into a crowded picture."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

Pixel = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: "Box") -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return max(width, 0.0) * max(height, 0.0)

    def distance(self, x: float, y: float) -> float:
        return math.hypot(
            max(self.left - x, x - self.right, 0), max(self.low - y, y - self.high, 0)
        )


def around(x: float, y: float, reach: float) -> Box:
    return Box(x - reach, y - reach, x + reach, y + reach)


def place(
    anchors: Sequence[Pixel], width: float, height: float, taken: Sequence[Box], inside: Box
) -> tuple[Box, Pixel]:
    """The free place for a name that is nearest to one of its anchors, and that anchor."""
    best, least = None, math.inf
    for radius, (x, y), angle in itertools.product(range(12, 132, 6), anchors, range(0, 360, 15)):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        # The edge of the name, not its middle, lies on the circle.
        left = x + radius * dx - width * (1 - dx) / 2
        low = y + radius * dy - height * (1 - dy) / 2
        box = Box(left, low, left + width, low + height)
        outside = width * height - box.overlap(inside)
        cost = sum(map(box.overlap, taken)) + 100 * max(outside, 0.0)
        if cost < least:
            best, least = (box, (x, y)), cost
        if cost < 1e-6:
            break
    assert best is not None
    return best
