"""Bin packing: pieces of text that share a row, by their costs.

Both ways give every piece the number of a row, from the costs alone, so that a plan is the same at
every start. A row has ``room``; every cost is from 1 to that.
"""

import numpy as np
from jaxtyping import Int64

OPEN = 64
"""Rows that `greedy` may still add to."""


def greedy(cost_P: Int64[np.ndarray, " P"], room: int) -> Int64[np.ndarray, " P"]:
    """The pieces in order, each in the first of the ``OPEN`` newest rows that has room for it, or
    else in a new one (first fit). Neighbours in the text stay near each other."""
    row_P = np.empty(len(cost_P), np.int64)
    left = np.zeros(OPEN, np.int64)  # of row r at r % OPEN
    rows = 0
    for piece, cost in enumerate(cost_P.tolist()):
        fits = left >= cost
        oldest = rows % OPEN
        at = oldest + int(fits[oldest:].argmax())
        if not fits[at]:
            at = int(fits.argmax())
        if not fits[at]:
            at, rows = oldest, rows + 1
            left[at] = room
        left[at] -= cost
        row_P[piece] = rows - 1 - (rows - 1 - at) % OPEN
    return row_P


def best_fit(cost_P: Int64[np.ndarray, " P"], room: int) -> Int64[np.ndarray, " P"]:
    """The pieces from the dearest to the cheapest, each in the row in which it leaves least room.

    Best-fit decreasing, as for "Fewer Truncations Improve Language Modeling", Ding et al., arXiv
    2404.10830. Pieces of one cost are placed together: rows with equally much room are alike, and
    the best row for a piece stays the best for the next of this cost for as long as it fits. So the
    work grows with the number of costs and rooms that occur, not with that of the pieces.
    """
    order_P = np.argsort(-cost_P, kind="stable")
    sorted_P = cost_P[order_P]
    placed_P = np.empty_like(order_P)
    rows, done = 0, 0
    by_room: dict[int, list[np.ndarray]] = {}
    rooms = 0  # bit r is set if a row has room r

    def leave(row_R: np.ndarray, left: int) -> None:
        nonlocal rooms
        if left and len(row_R):
            by_room.setdefault(left, []).append(row_R)
            rooms |= 1 << left

    for end in (*(np.flatnonzero(np.diff(sorted_P)) + 1).tolist(), len(sorted_P)):
        while done < end:
            cost, count = int(sorted_P[done]), end - done
            fitting = rooms >> cost
            if fitting:
                left = cost + (fitting & -fitting).bit_length() - 1
                rooms ^= 1 << left
                row_R = np.concatenate(by_room.pop(left))
            else:
                left = room
                row_R = np.arange(rows, rows - (-count // (room // cost)))
                rows += len(row_R)
            each = left // cost
            full, rest = divmod(count, each)
            if full >= len(row_R):
                full, rest = len(row_R), 0
            used = full + (rest > 0)
            placed = np.repeat(row_R[:used], each)[: full * each + rest]
            placed_P[done : done + len(placed)] = placed
            done += len(placed)
            leave(row_R[:full], left - each * cost)
            leave(row_R[full:used], left - rest * cost)
            leave(row_R[used:], left)
    row_P = np.empty_like(placed_P)
    row_P[order_P] = placed_P
    return row_P
