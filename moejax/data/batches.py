"""Batches of numbered rows: training batches as a function of the step, and held-out batches.

A source gives the number of its rows and a function that reads some of them; what a row is (a
window of a text, an image, an example of a table) is the source's business. The data position of
a run is one integer, the global step: batch b is rows b*B .. (b+1)*B of the epochs laid end to end,
each epoch a seeded permutation of all rows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int64

from moejax.data.source import Batch
from moejax.errors import UserError

Read = Callable[[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]], Batch]
"""Read rows: ``read(row_B, position_B)`` returns arrays that lead with B, ``valid`` among them.

``row_B`` numbers rows of the data. ``position_B`` is their position in the order of reading:
``step * B + i`` in training, the index among the evaluated rows in evaluation. Random draws of a
source, such as shifts of images, depend on seed and position alone.
"""

MAX_SEED = 1 << 32
ROW_IDS = 1 << 31


def endless_order(num_rows: int, seed: int) -> Any:
    """The row at any position: epoch after epoch, each a permutation of its own."""
    import grain  # slow to import

    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()


class TrainBatches:
    """Shuffled batches, for any step, in any order.

    Args:
      num_rows: rows to train on, at least 1.
      batch_size: rows per global batch (B).
      seed: seed of the permutations, in [0, 2**32).
      read: reads rows.
      order: the row at any position (default: ``endless_order``).
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int, read: Read, order: Any | None = None
    ):
        if batch_size < 1:
            raise UserError(f"train.batch_size: {batch_size} must be at least 1")
        if not 0 <= seed < MAX_SEED:
            raise UserError(f"train.seed: {seed} is not in [0, 2**32)")
        if num_rows < 1:
            raise UserError("data.path: there are no training rows; lower data.eval_fraction")
        self.num_rows, self._batch_size, self._read = num_rows, batch_size, read
        self._order = endless_order(num_rows, seed) if order is None else order

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of one step, or some of its rows (a host's share).

        Returns what ``read`` gives, and ``row`` int32 [B], the global row id ``step*B + i`` modulo
        2**31. With ``rows``, the same arrays sliced by it; only those rows are read.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        share = range(self._batch_size)[rows if rows is not None else slice(None)]
        position_B = np.array([step * self._batch_size + i for i in share], dtype=np.int64)
        row_B = np.array([self._order[int(at)] for at in position_B], dtype=np.int64)
        return {**self._read(row_B, position_B), "row": (position_B % ROW_IDS).astype(np.int32)}


def heldout_batches(num_rows: int, batch_size: int, count: int, read: Read) -> list[Batch]:
    """Batches of ``count`` rows spread evenly over all held-out rows, the same at every call.

    Fewer if there are fewer; see ``batches_of``.
    """
    return batches_of(spread_evenly(num_rows, count), batch_size, read)


def batches_of(row_N: Int64[np.ndarray, " N"], batch_size: int, read: Read) -> list[Batch]:
    """Batches of the given rows, in order.

    The last batch is padded with rows of zeros, which are not ``valid``. ``row`` counts the rows of
    this list.
    """
    batches = []
    for begin in range(0, len(row_N), batch_size):
        row_B = row_N[begin : begin + batch_size]
        position_B = np.arange(begin, begin + batch_size)
        arrays = read(row_B, position_B[: len(row_B)])
        padded = {name: _padded(array, batch_size) for name, array in arrays.items()}
        batches.append({**padded, "row": position_B.astype(np.int32)})
    return batches


def spread_evenly(num_rows: int, count: int) -> Int64[np.ndarray, " N"]:
    """The rows of ``heldout_batches``: at most ``count`` of ``num_rows``, evenly spread."""
    if count < 1:
        raise UserError(f"train.eval_rows: {count} must be at least 1")
    if num_rows < 1:
        raise UserError("data.eval_fraction: there are no held-out rows; raise it")
    count = min(count, num_rows)
    return np.array([j * num_rows // count for j in range(count)], dtype=np.int64)


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    return np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
