"""Rows of whole documents: every document for itself, as many in a row as fit.

A document t1 .. tn is predicted from the separator before it, and ends with the prediction of the
separator behind it. That separator is also the first input of the next document, so that no input
is lost between them:

    tokens    SEP  t1  t2  SEP  u1  SEP  0
    segment    0    0   0   1    1   0
    valid      1    1   1   1    1   0

If an opening, such as a BOS token, begins every document, it stands in for the separator before it.
The separator is then a target and no input, and a document of m tokens, opening included, takes
m + 1 places for tokens, of which a row has one more than inputs.

A document that is longer than a row is cut into full rows. The rest is packed like a document; its
first token is no separator, so that a place is lost where it does not begin its row.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from moejax.data.joined import Tokens
from moejax.data.source import Batch
from moejax.errors import UserError
from moejax.tasks.language.bins import best_fit, greedy

WAYS = {"greedy": greedy, "best_fit": best_fit}

CHECKED = 10_000
"""About as many documents are checked: all would read the whole of a memory-mapped stream."""


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Rows of the documents of a token stream, which may be memory-mapped.

    Attributes:
      tokens_N: documents joined by ``separator``; one may be behind the last document, too.
      start_D: where each document begins, its opening included.
      opened: whether every document begins with an opening.
      packing: a name in ``WAYS``.
      name: the text, for errors.

    Raises UserError for an unknown ``start_D``, or documents that are not joined by the separator.
    """

    tokens_N: Tokens
    start_D: Int64[np.ndarray, " D"] | None
    separator: int
    opened: bool
    seq_len: int
    packing: str
    name: str

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"train.seq_len: {self.seq_len} must be at least 1")
        start_D = self.start_D
        if start_D is None:
            raise UserError(
                f"data.packing={self.packing}: where documents begin in {self.name!r} is not "
                "known; prepare the text again (moejax data prepare), name the tokenizer of token "
                "arrays in data.tokenizer, or use data.packing=none"
            )
        some_D = start_D[1 :: 1 + len(start_D) // CHECKED]
        if np.any(self.tokens_N[some_D - 1] != self.separator):
            raise UserError(
                f"data.packing={self.packing}: the documents of {self.name!r} are not joined by "
                f"token {self.separator}, the separator; use data.packing=none"
            )

    @functools.cached_property
    def plan(self) -> "Plan":
        assert self.start_D is not None  # see __post_init__
        size = len(self.tokens_N)
        if size and int(self.tokens_N[-1]) == self.separator:  # as token arrays have it
            size -= 1
        pieces = pieces_of(self.start_D, size, self.seq_len, self.opened)
        return plan(pieces, self.seq_len, self.opened, self.packing)

    def __len__(self) -> int:
        return len(self.plan.first_R) - 1

    @functools.cached_property
    def padding(self) -> float:
        """The share of all inputs that are not valid."""
        return 1 - int(self.plan.inputs_P.sum(dtype=np.int64)) / (len(self) * self.seq_len)

    @functools.cached_property
    def cut(self) -> int:
        """The number of documents that are longer than a row."""
        return len(np.unique(self.plan.document_P[self.plan.is_rest_P]))

    def read(self, row_B: Int64[np.ndarray, " B"], position_B: Int64[np.ndarray, " B"]) -> Batch:
        """See `Rows.read`."""
        plan, size = self.plan, len(self.tokens_N)
        piece_P, line_P, number_P = plan.pieces(row_B)
        shape = (len(row_B), self.seq_len + 1)
        tokens_BL, segment_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        valid_BL = np.zeros(shape, bool)
        fields = (line_P, number_P, plan.begin_P[piece_P], plan.inputs_P[piece_P],
                  plan.offset_P[piece_P])  # fmt: skip
        for line, number, begin, inputs, at in zip(*(x.tolist() for x in fields), strict=True):
            end = begin + inputs  # the place of the last target
            segment_BL[line, at : at + inputs] = number
            valid_BL[line, at : at + inputs] = True
            tokens_L = tokens_BL[line, at : at + inputs + 1]
            first, last = int(begin < 0), int(end == size)
            tokens_L[first : inputs + 1 - last] = self.tokens_N[begin + first : end + 1 - last]
            if first:
                tokens_L[0] = self.separator
            if last:
                tokens_L[-1] = self.separator
        return {"tokens": tokens_BL, "valid": valid_BL[:, :-1], "segment": segment_BL[:, :-1]}

    def places(self, row_B: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B L"]:
        """See `Rows.places`."""
        piece_P, line_P, _ = self.plan.pieces(row_B)
        which_T, nth_T = _expand(self.plan.inputs_P[piece_P])
        place_BL = np.zeros((len(row_B), self.seq_len), np.int64)
        at_T = (line_P * self.seq_len + self.plan.offset_P[piece_P])[which_T] + nth_T
        place_BL.flat[at_T] = self.plan.begin_P[piece_P][which_T] + nth_T
        return place_BL


def _expand(count_P: Integer[np.ndarray, " P"]) -> tuple[np.ndarray, np.ndarray]:
    """The element that each of its repetitions is of, and the number of the repetition."""
    count_P = count_P.astype(np.int64)
    which_T = np.repeat(np.arange(len(count_P)), count_P)
    return which_T, np.arange(len(which_T)) - (np.cumsum(count_P) - count_P)[which_T]


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Documents, and the full rows and the rests of those that are longer than a row.

    Attributes:
      begin_P: the place of the first input in the stream; -1 is before the stream.
      inputs_P: the number of inputs; their targets are one place behind them.
      document_P: the document.
      is_rest_P: True for what follows a full row.
    """

    begin_P: Int64[np.ndarray, " P"]
    inputs_P: Int32[np.ndarray, " P"]
    document_P: Int64[np.ndarray, " P"]
    is_rest_P: Bool[np.ndarray, " P"]


def pieces_of(start_D: Int64[np.ndarray, " D"], size: int, seq_len: int, opened: bool) -> Pieces:
    """The pieces of a stream of ``size`` tokens, in order. Documents without tokens have none."""
    end_D = np.append(start_D[1:] - 1, size)  # of the separator behind each
    first_D = start_D if opened else start_D - 1
    inputs_D = np.where(end_D > start_D, end_D - first_D, 0)
    document_P, nth_P = _expand(-(-inputs_D // seq_len))
    before_P = nth_P * seq_len
    return Pieces(
        first_D[document_P] + before_P,
        np.minimum(inputs_D[document_P] - before_P, seq_len).astype(np.int32),
        document_P,
        nth_P > 0,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(Pieces):
    """Pieces row by row.

    Attributes:
      offset_P: the index of a piece's first input in its row.
      first_R: the first piece of each row, and behind the last row the number of pieces.
    """

    offset_P: Int32[np.ndarray, " P"]
    first_R: Int64[np.ndarray, " R1"]

    def pieces(self, row_B: Int64[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of these rows, the index of the row of each, and its own in its row."""
        first_B = self.first_R[row_B]
        line_P, nth_P = _expand(self.first_R[row_B + 1] - first_B)
        return first_B[line_P] + nth_P, line_P, nth_P


def plan(pieces: Pieces, seq_len: int, opened: bool, packing: str) -> Plan:
    """Gives every piece a row and a place in it. Rows are in the order of their first documents."""
    # A piece that begins with the separator shares it with the piece before.
    alone_P = pieces.is_rest_P | opened
    cost_P = (pieces.inputs_P + alone_P).astype(np.int64)
    room = seq_len + opened
    full_P = pieces.inputs_P == seq_len
    row_P = np.empty(len(cost_P), np.int64)
    row_P[~full_P] = WAYS[packing](cost_P[~full_P], room)
    rows = int(row_P[~full_P].max(initial=-1)) + 1
    row_P[full_P] = np.arange(rows, rows + int(full_P.sum()))
    _, first_R, row_P = np.unique(row_P, return_index=True, return_inverse=True)
    row_P = np.argsort(np.argsort(first_R))[row_P]
    # The first of a row loses no place, so that a rest comes first.
    order_P = np.lexsort((~alone_P, row_P))
    row_P, alone_P, inputs_P = row_P[order_P], alone_P[order_P], pieces.inputs_P[order_P]
    is_first_P = np.diff(row_P, prepend=-1) > 0
    first_R = np.flatnonzero(is_first_P)
    end_P = np.cumsum(inputs_P + (alone_P & ~is_first_P), dtype=np.int64)
    begin_P = end_P - inputs_P
    return Plan(
        pieces.begin_P[order_P],
        inputs_P,
        pieces.document_P[order_P],
        pieces.is_rest_P[order_P],
        (begin_P - begin_P[first_R][row_P]).astype(np.int32),
        np.append(first_R, len(row_P)),
    )
