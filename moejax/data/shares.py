"""Sources that take turns: rows in given shares, in an order with random access.

The source at a position and its count of rows before it are pure functions of the position, so that
any host can read any part of the order, and a run resumes anywhere in it.

The first source gets its share of the first n positions, rounded up; the positions that are left
are divided among the other sources in the same way. Every prefix of the order thus has as many rows
of each source as its share asks for, give or take one row for each source. ``grain.MapDataset.mix``
takes turns alike, but rounds weights to a hundredth of the smallest.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int64

from moejax.data.batches import MAX_SEED, endless_order


class Turns:
    """The turns of several sources.

    Args:
      shares: of the positions, each above 0; they sum to 1.
    """

    def __init__(self, shares: Sequence[Fraction]):
        scale = math.lcm(*(share.denominator for share in shares))
        weights = [int(share * scale) for share in shares]
        # Of what the sources before have left: the part that this one leaves, as two whole numbers.
        left = [sum(weights[i:]) for i in range(len(weights) + 1)]
        self._left = list(zip(left[1:], left[:-1], strict=True))

    def at(self, position: int) -> tuple[int, int]:
        """The source of a position, and the number of its rows before."""
        for source, (part, whole) in enumerate(self._left):
            rest, following = position * part // whole, (position + 1) * part // whole
            if rest == following:
                return source, position - rest
            position = rest
        raise AssertionError("the last source leaves nothing")

    def counts(self, positions: int) -> tuple[int, ...]:
        """Rows of each source among the first positions."""
        counts = []
        for part, whole in self._left:
            rest = positions * part // whole
            counts.append(positions - rest)
            positions = rest
        return tuple(counts)


def mixed_order(
    rows: Sequence[int], shares: Sequence[Fraction], names: Sequence[str], seed: int
) -> Any:
    """The row at any position, of several sources whose rows are numbered one after the other.

    The rows of a source are in an endless order of their own, see ``endless_order``, which depends
    on the seed and on the source's name alone.
    """
    import grain  # slow to import

    class Selection(grain.transforms.DatasetSelectionMap):
        """``Turns`` in grain's form."""

        turns = Turns(shares)

        def __len__(self) -> int:
            return min(map(len, orders))

        def __getitem__(self, index: int) -> tuple[int, int]:
            return self.turns.at(index)

    begins = np.cumsum([0, *rows])[:-1]
    orders = [
        endless_order(count, seed_of(name, seed)).map(lambda row, begin=int(begin): begin + row)
        for name, count, begin in zip(names, rows, begins, strict=True)
    ]
    return grain.MapDataset.select_from_datasets(orders, Selection())


def seed_of(name: str, seed: int) -> int:
    """The seed of a source: two sources of as many rows are not read in the same order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % MAX_SEED


def apportioned(seats: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers that sum to ``seats``, nearest to the shares of it (by largest remainder).

    Each is at least 1 if there are as many seats as shares.
    """
    exact = [seats * share for share in shares]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: seats - sum(counts)]:
        counts[i] += 1
    while seats >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return tuple(counts)


def interleaved(counts: Sequence[int]) -> Int64[np.ndarray, " N"]:
    """The source of each of ``sum(counts)`` rows, those of a source evenly spread over all."""
    source_N = np.repeat(np.arange(len(counts)), counts)
    place_N = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return source_N[np.argsort(place_N, kind="stable")].astype(np.int64)
