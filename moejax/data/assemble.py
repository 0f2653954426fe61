"""The two token streams of a corpus, from the documents of its units.

Exact copies of a document are left out, the side of each document is settled, and the documents of
each side are joined in the order of the units. All that is decided here is decided by digests and
sizes, so that it neither needs the texts in memory nor depends on how they were divided into units.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt, UInt64

from moejax.data.encode import Encoded
from moejax.data.units import BY_HASH, HELDOUT, TRAIN
from moejax.errors import UserError

_MIXED = np.uint64(0x9E3779B97F4A7C15)
"""An odd factor, with which the order of digests is not that of the digests themselves."""
BUCKETS = 64
"""Parts, by their digests, in which copies are looked for, so that the sort fits into memory."""


SIDES = (TRAIN, HELDOUT, BY_HASH)
LONG = 2
"""A document of so many times the mean size is long."""


@dataclasses.dataclass(frozen=True, eq=False)
class Listed:
    """All documents in the order of the units: tokens, bytes, digest and side.

    ``side_D``: an index into ``SIDES``.
    """

    length_D: Int64[np.ndarray, " D"]
    size_D: Int64[np.ndarray, " D"]
    digest_D2: UInt64[np.ndarray, "D 2"]
    side_D: UInt[np.ndarray, " D"]

    @classmethod
    def of(cls, chunks: Iterable[Encoded]) -> "Listed":
        parts = [
            (x.length_D, x.size_D, x.digest_D2, np.full(len(x.size_D), SIDES.index(x.side), "u1"))
            for x in chunks
        ]
        if not parts:  # of files of records without any
            none = np.zeros(0, np.int64)
            return cls(none, none, np.zeros((0, 2), np.uint64), none.astype("u1"))
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The documents of each side, and the number of exact copies left out."""

    train_D: Bool[np.ndarray, " D"]
    heldout_D: Bool[np.ndarray, " D"]
    copies: int


def choose(listed: Listed, share: float, by_count: bool, drop_copies: bool) -> Choice:
    """Settle the side of every document.

    Of equal documents the first is kept, and one that is held out rather than one that is trained
    on. Documents whose side is open are held out in the order of their digests, as many as fit
    into the share (at least one), without those that are both long and larger than the share.

    Args:
      share: share of the bytes of the open documents to hold out.
      by_count: whether it is a share of their number instead.
      drop_copies: whether copies are left out at all.

    Raises:
      UserError: a side without documents.
    """
    if not len(listed.size_D):
        raise UserError("data.path: no document has any text; name files with text in them")
    heldout_D = listed.side_D == SIDES.index(HELDOUT)
    kept_D = first_of_equals(listed.digest_D2, heldout_D) if drop_copies else None
    if kept_D is None:
        kept_D = np.ones(len(listed.size_D), bool)
    open_D = (listed.side_D == SIDES.index(BY_HASH)) & kept_D
    if open_D.any():
        heldout_D = heldout_D | _smallest_hashes(listed, open_D, share, by_count)
    train_D = kept_D & ~heldout_D
    heldout_D &= kept_D
    if not train_D.any():
        copies = int(np.sum(~kept_D))
        why = f" ({copies} are exact copies; data.duplicates=keep keeps them)" if copies else ""
        raise UserError(
            f"data.path: no document is left to train on beside the held-out ones{why}; give more "
            "text, or lower data.eval_fraction"
        )
    if not heldout_D.any():
        raise UserError(
            "data.eval_path: there is no document to hold out; name a text with documents in it"
        )
    return Choice(train_D, heldout_D, int(np.sum(~kept_D)))


def first_of_equals(
    digest_D2: UInt64[np.ndarray, "D 2"], preferred_D: Bool[np.ndarray, " D"]
) -> Bool[np.ndarray, " D"]:
    """True for one document of each group of equal ones: the first of those that are preferred, or
    else the first."""
    kept_D = np.zeros(len(digest_D2), bool)
    bucket_D = (digest_D2[:, 0] >> np.uint64(58)).astype(np.uint8)
    assert BUCKETS == 1 << 6
    for bucket in range(BUCKETS):
        index = np.flatnonzero(bucket_D == bucket)
        high, low = digest_D2[index, 0], digest_D2[index, 1]
        order = np.lexsort((~preferred_D[index], low, high))  # stable: then by their places
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
        kept_D[index[order[new]]] = True
    return kept_D


def _smallest_hashes(
    listed: Listed, open_D: np.ndarray, share: float, by_count: bool
) -> Bool[np.ndarray, " D"]:
    """The open documents with the smallest hashes that fit into the share, at least one."""
    index = np.flatnonzero(open_D)
    if len(index) < 2:
        raise UserError(
            "data.path: it holds one document, so that nothing is left to hold out; name a "
            "held-out text in data.eval_path"
        )
    rank_N = listed.digest_D2[index, 0] * _MIXED
    size_N = np.ones(len(index), np.int64) if by_count else listed.size_D[index]
    wanted = share * size_N.sum()
    # A long document that exceeds the share by itself would leave little to train on.
    is_long_N = size_N > max(wanted, LONG * size_N.mean())
    index, rank_N, size_N = index[~is_long_N], rank_N[~is_long_N], size_N[~is_long_N]
    # The smallest are enough nearly always, and sorting them takes less memory than sorting all.
    likely_N = np.flatnonzero(rank_N <= min(2 * share + 64 / len(index), 1.0) * (2**64 - 1))
    for candidates in (likely_N, np.arange(len(index))):
        order = candidates[np.argsort(rank_N[candidates], kind="stable")]
        fits = int(np.searchsorted(np.cumsum(size_N[order]), wanted, side="right"))
        if fits < len(order):
            break
    most = len(index) if is_long_N.any() else len(index) - 1
    last = order[min(max(fits, 1), most) - 1]
    chosen_D = np.zeros(len(open_D), bool)
    chosen_D[index[rank_N <= rank_N[last]]] = True  # with all copies of the last one
    return chosen_D


def joined(
    value_N: UInt[np.ndarray, " N"],
    length_S: Int64[np.ndarray, " S"],
    kept_S: Bool[np.ndarray, " S"],
    lead: Sequence[int],
    opens: bool = True,
) -> UInt[np.ndarray, " M"]:
    """The kept documents of a chunk, with ``lead`` in front of each.

    ``value_N``: tokens of all documents of the chunk, whose numbers are ``length_S``, or their
    bytes; ``lead`` is then the separator and the tokens that begin a document, or theirs. With
    ``opens`` false the first document began earlier, and has no ``lead`` here.
    """
    width_S = np.full(len(length_S), len(lead))
    width_S[: not opens] = 0
    if not kept_S.all():
        value_N = value_N[np.repeat(kept_S, length_S)]
        length_S, width_S = length_S[kept_S], width_S[kept_S]
    start_S = np.cumsum(length_S + width_S) - length_S
    stream = np.empty(len(value_N) + int(width_S.sum()), value_N.dtype)
    is_own_M = np.ones(len(stream), bool)
    start_S = start_S[width_S > 0]
    for back, value in enumerate(reversed(lead), 1):
        stream[start_S - back] = value
        is_own_M[start_S - back] = False
    stream[is_own_M] = value_N
    return stream


def starts(length_K: Int64[np.ndarray, " K"], lead: int) -> Int64[np.ndarray, " K"]:
    """Positions in a stream of its documents, behind the separators.

    ``length_K``: tokens of each document without its ``lead``.
    """
    return np.cumsum(length_K + lead) - (length_K + lead)


def token_parts(
    chunks: Iterable[Encoded], kept_D: Bool[np.ndarray, " D"], lead: Sequence[int]
) -> Iterator[UInt[np.ndarray, " M"]]:
    """The stream of the kept documents, a part for each chunk. It begins with a document, without
    the separator before it."""
    parts = (
        joined(chunk.token_N, chunk.length_S, kept, lead, chunk.opens)
        for chunk, kept in _with_kept(chunks, kept_D)
    )
    return _without_first(parts)


def size_parts(
    chunks: Iterable[Encoded],
    kept_D: Bool[np.ndarray, " D"],
    lead: Sequence[int],
    table_V: UInt[np.ndarray, " V"] | None,
) -> Iterator[UInt[np.ndarray, " M"]]:
    """Bytes of each token of ``token_parts``. ``table_V``: those of each id; None if they depend on
    the text."""

    def parts() -> Iterator[np.ndarray]:
        for chunk, kept in _with_kept(chunks, kept_D):
            if kept.any():
                size_N = chunk.size_N if table_V is None else table_V[chunk.token_N]
                assert size_N is not None, "chunks that may be held out have sizes"
                yield joined(size_N, chunk.length_S, kept, lead, chunk.opens)

    return _without_first(parts())


def _with_kept(
    chunks: Iterable[Encoded], kept_D: np.ndarray
) -> Iterator[tuple[Encoded, np.ndarray]]:
    """Each chunk with its part of ``kept_D``; that of a document is in all chunks with the same."""
    begin = 0
    for chunk in chunks:
        yield chunk, kept_D[begin : begin + len(chunk.length_S)]
        begin += len(chunk.length_D)


def _without_first(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The parts without the first element of all."""
    done = False
    for part in parts:
        yield part if done else part[1:]
        done = done or len(part) > 0
