"""Training batches of a stream, as a pure function of the step.

Row r of training is row ``order[r - place.row]`` of the block that holds it, where ``order`` is a
permutation drawn from seed, epoch and block. Forward, blocks are read one after another, the next
ones in a thread while this one is trained on. Backward, and after a resume, reading continues at
the last known beginning of a block before the row.
"""

import bisect
import threading
import weakref
from typing import Any

import numpy as np

from moejax.data.batches import MAX_SEED, ROW_IDS
from moejax.data.source import Batch
from moejax.data.stream.blocks import START, Block, Blocks, Place
from moejax.errors import UserError

AHEAD = 1
"""Blocks that wait ready; the thread holds one more that it has just made."""


class StreamBatches:
    """Batches of a stream of blocks, for any step.

    Args:
      blocks: the stream; nothing else may use it.
      batch_size: rows per global batch (B).
      seed: seed of the permutations, in [0, 2**32).
    """

    def __init__(self, blocks: Blocks, batch_size: int, seed: int) -> None:
        from grain.experimental import ThreadPrefetchDatasetIterator  # slow to import

        if batch_size < 1:
            raise UserError(f"train.batch_size: {batch_size} must be at least 1")
        if not 0 <= seed < MAX_SEED:
            raise UserError(f"train.seed: {seed} is not in [0, 2**32)")
        self._batch_size, self._seed = batch_size, seed
        self._blocks, self._ahead = blocks, [ThreadPrefetchDatasetIterator(blocks, AHEAD)]
        # At the exit of Python too: a thread that is then in C++ would abort the process.
        weakref.finalize(self, _close, blocks, self._ahead)
        self._begins = [START]  # of all blocks read so far, in order
        self._block: Block | None = None
        self._order_R = np.zeros(0, np.int64)
        self._lock = threading.Lock()

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of one step, or some of its rows: see ``TrainBatches.batch``."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        share = range(self._batch_size)[rows if rows is not None else slice(None)]
        position_B = np.array([step * self._batch_size + i for i in share], dtype=np.int64)
        parts = []
        with self._lock:
            begin = 0
            while begin < len(position_B):
                block = self._block_of(int(position_B[begin]))
                end = begin + np.searchsorted(position_B[begin:], block.after.row)
                row_B = self._order_R[position_B[begin:end] - block.place.row]
                parts.append(block.rows.read(row_B, position_B[begin:end]))
                begin = end
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**arrays, "row": (position_B % ROW_IDS).astype(np.int32)}

    def place(self, step: int) -> Place:
        """A place from which the rows of a step can be read: the last known block before them."""
        with self._lock:
            return self._before(step * self._batch_size)

    def learn(self, place: Place) -> None:
        """Take a place of the same stream from an earlier process, to read on from there."""
        with self._lock:
            if place not in self._begins:
                bisect.insort(self._begins, place)

    def _before(self, row: int) -> Place:
        return self._begins[bisect.bisect_right(self._begins, row, key=lambda x: x.row) - 1]

    def _block_of(self, row: int) -> Block:
        """The block that holds a row, which becomes the current one."""
        block = self._block
        if block is None or not block.place.row <= row < block.after.row:
            near = self._before(row)
            if block is None or near != block.after:
                self._blocks.interrupt()
                self._ahead[0].set_state({"place": near})
            self._block = block = None  # it is freed before others are read
            while block is None or row >= block.after.row:
                block = next(self._ahead[0])
                self._note(block)
            self._block, self._order_R = block, _order(block, self._seed)
        return block

    def _note(self, block: Block) -> None:
        if block.after not in self._begins[-1:] and block.after.row > self._begins[-1].row:
            self._begins.append(block.after)


def _close(blocks: Blocks, ahead: list[Any]) -> None:
    """End the thread that reads ahead, and free the only iterator that has it.

    At the exit of Python, grain could not free it later.
    """
    blocks.interrupt()
    ahead.pop().close()


def _order(block: Block, seed: int) -> np.ndarray:
    """The order of a block's rows.

    Of numpy's generators, RandomState alone is promised to be the same in every version. grain's
    ``index_shuffle`` walks through 65536 numbers to order a few rows.
    """
    own = np.random.SeedSequence([seed, block.place.epoch, block.place.block])
    return np.random.RandomState(np.random.MT19937(own)).permutation(len(block.rows))


def as_place(saved: Any) -> Place | None:
    """A place as it was saved in JSON; None if it is none."""
    if isinstance(saved, list) and len(saved) == len(START) and all(type(x) is int for x in saved):
        return Place(*saved)
    return None
