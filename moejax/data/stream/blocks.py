"""The endless stream of training tokens in blocks of rows, from any place on.

An epoch is all units in an order drawn for it. Its documents, each after a separator, are one
stream of tokens, which is cut into blocks of about ``BLOCK`` tokens; each block becomes rows. The
last block of an epoch is shorter, and an end too short for a row is left out, so that no row holds
tokens of two epochs.

A place in the stream is six numbers, from which the rest is read again: see ``Place``. grain's own
chain of datasets (``FlatMapIterDataset``, ``ConcatThenSplitIterDataset``) does not fit: it holds
all documents of a unit at once, its rows do not overlap by the token that is both a target and an
input, and its state is found again only by reading from the beginning of the unit's epoch.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer

from moejax.data.source import Batch
from moejax.data.stream.encode import Encoded
from moejax.errors import UserError

BLOCK = 1 << 22
"""Tokens of a block: 4096 rows of 1024. Rows of one block are shuffled, so that more is better; but
the first step waits for a block, a tokenizer takes seconds for this many, and memory holds four."""


def rows_of_block(seq_len: int) -> int:
    """Rows of a block that is not the last of its epoch."""
    return max(BLOCK // seq_len, 1)


class Place(NamedTuple):
    """A place in the stream at which a block begins.

    Attributes:
      epoch, block: numbers of the epoch and of the block in it.
      row: rows before the block since the beginning of training.
      unit, record: the document: the unit's position in the order of the epoch, the record in it.
      skip: tokens of that document, with the separator before it, that belong to the block before.
    """

    epoch: int
    block: int
    row: int
    unit: int
    record: int
    skip: int


START = Place(0, 0, 0, 0, 0, 1)
"""The first document of an epoch has no separator before it."""


@runtime_checkable
class Rows(Protocol):
    """Numbered rows of a block."""

    def __len__(self) -> int: ...

    def read(
        self, row_B: Int64[np.ndarray, " B"], position_B: Int64[np.ndarray, " B"]
    ) -> Batch: ...


class Interrupted(Exception):
    """The block is not wanted any more."""


class Block(NamedTuple):
    """Rows from one place of the stream to the next, in the order of the text."""

    place: Place
    after: Place
    rows: Rows


Documents = Callable[[int, int, int], Iterator[Encoded]]
"""``documents(epoch, unit, record)``: the documents of an epoch from a place on, in order; ``unit``
counts in the order of the epoch."""

MakeRows = Callable[[Integer[np.ndarray, " N"], Int64[np.ndarray, " D"]], Rows]
"""Rows of a stretch of tokens, and the positions in it at which documents begin."""


class Blocks:
    """Blocks one after another; an iterator with a state, as of grain.

    Args:
      documents: reads the text.
      before: tokens before every document, the separator first.
      seq_len: targets of a row (L).
      make_rows: makes rows of a block's tokens.
      whole: a block ends with a document. Otherwise its rows are windows: it has
        ``rows * seq_len + 1`` tokens, and the last is the first of the next block.

    Raises:
      UserError: from ``next``, if an epoch has not enough text for one row.
    """

    def __init__(
        self,
        documents: Documents,
        before: Integer[np.ndarray, " S"],
        seq_len: int,
        make_rows: MakeRows,
        whole: bool = False,
    ) -> None:
        self._documents, self._before, self._make_rows = documents, before, make_rows
        self._seq_len, self._whole = seq_len, whole
        self._wanted = rows_of_block(seq_len) * seq_len
        self.set_state({"place": START})

    def get_state(self) -> dict[str, Any]:
        return {"place": self._place}

    def set_state(self, state: dict[str, Any]) -> None:
        self._interrupted = False
        self._place = Place(*state["place"])
        place = self._place
        self._reading = self._documents(place.epoch, place.unit, place.record)
        self._waiting: deque[tuple[int, int, np.ndarray]] = deque()
        self._skip = place.skip

    def interrupt(self) -> None:
        """End a ``next`` of another thread soon, with an exception; ``set_state`` begins anew."""
        self._interrupted = True

    def __iter__(self) -> "Blocks":
        return self

    def __next__(self) -> Block:
        while True:
            block = self._next_of_epoch()
            if block is not None:
                self._place = block.after
                return block
            if self._place.block == 0:
                raise UserError(
                    f"train.seq_len={self._seq_len}: the text to train on is too short for one "
                    "row; give more in data.path, or lower train.seq_len or data.eval_fraction"
                )
            place = START._replace(epoch=self._place.epoch + 1, row=self._place.row)
            self.set_state({"place": place})

    def _next_of_epoch(self) -> Block | None:
        """The next block; None if the rest of the epoch has no row."""
        self._fill()
        if not self._waiting:
            return None
        tokens = np.concatenate([document for _, _, document in self._waiting])[self._skip :]
        begins = np.cumsum([0, *(len(document) for _, _, document in self._waiting)][:-1])
        begins = (begins + 1 - self._skip).astype(np.int64)
        if self._whole:
            unit, record, _ = self._waiting[-1]
            self._waiting.clear()
            self._skip = 1
            after = (unit, record + 1, 1)
        else:
            rows = min(len(tokens) - 1, self._wanted) // self._seq_len
            if rows < 1:
                return None
            tokens = tokens[: rows * self._seq_len + 1].copy()
            after = self._pass(rows * self._seq_len)
        made = self._make_rows(tokens, begins[(begins >= 0) & (begins < len(tokens))])
        place = self._place
        then = Place(place.epoch, place.block + 1, place.row + len(made), *after)
        return Block(place, then, made)

    def _fill(self) -> None:
        """Read until there are the tokens of a block, or the epoch is over."""
        missing = self._wanted + 1 + self._skip - sum(len(x) for _, _, x in self._waiting)
        while missing > 0:
            if self._interrupted:
                raise Interrupted
            document = next(self._reading, None)
            if document is None:
                return
            tokens = np.concatenate([self._before.astype(document.token_N.dtype), document.token_N])
            self._waiting.append((document.unit, document.number, tokens))
            missing -= len(tokens)

    def _pass(self, tokens: int) -> tuple[int, int, int]:
        """Drop tokens from the beginning of those that wait; the place of the next one."""
        self._skip += tokens
        while self._skip >= len(self._waiting[0][2]):
            self._skip -= len(self._waiting.popleft()[2])
        unit, record, _ = self._waiting[0]
        return unit, record, self._skip
