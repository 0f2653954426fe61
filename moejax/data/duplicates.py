"""Text that occurs twice: near copies among documents, and overlap of the two sides of a split.

Documents are compared by their shingles (Broder 1997, "On the resemblance and containment of
documents"): a document is the set of its windows of 32 bytes, sampled to those whose hash is 0
modulo 16 (his sketch V), and the containment of A in B is the share of A's sketch that is in B's.
Lee et al. (2022, "Deduplicating training data makes language models better", arXiv 2107.06499)
remove near copies in the same way, at 0.8, by MinHash of the resemblance; containment also finds a
short table inside a longer one. The overlap of two sides is counted on windows of 50 bytes, as
theirs on exact substrings.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt64

from moejax.data.documents import Document

SHINGLE, SAMPLED_BITS = 32, 4
COPY = 0.8
"""The least containment of a near copy."""
RELATED = 1000
"""The least number of shared shingles, about, of two documents in one group."""
WINDOW = 50
MOST_TRAIN, MOST_HELDOUT = 1 << 27, 1 << 22
"""Most bytes of each side that ``overlap`` compares, in evenly spread stretches of longer text."""
STRETCH = 1 << 20
BLOCK = 1 << 15
"""Windows that are hashed at once, so that their hashes stay in a processor's cache."""

_BASE = 0x9E3779B97F4A7C15
_WORD = 1 << 64


def window_hashes(text: UInt8[np.ndarray, " N"], width: int) -> UInt64[np.ndarray, " M"]:
    """A hash of every window of `width` bytes: the polynomial of its bytes modulo 2^64.

    Hashes of windows of 1, 2, 4, ... bytes combine two of half the width, and those in the binary
    expansion of `width` are joined. The upper bits are the well-mixed ones.
    """
    power = text.astype(np.uint64) + np.uint64(1)
    hashes, done, size = None, 0, 1
    while True:
        if width & size:
            hashes = power if hashes is None else _join(hashes, power, done, size)
            done += size
        if done == width:
            assert hashes is not None
            return hashes
        power, size = _join(power, power, size, size), 2 * size


def _join(left: np.ndarray, right: np.ndarray, width: int, right_width: int) -> np.ndarray:
    """Hashes of windows of `width` bytes followed by `right_width` more."""
    count = max(min(len(left), len(right) - width), 0)
    factor = np.uint64(pow(_BASE, right_width, _WORD))
    return left[:count] * factor + right[width : width + count]


def distinct(value_N: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " M"]:
    """The different values in their order. The hash table of ``numpy.unique`` takes many times as
    long for a million values."""
    sorted_N = np.sort(value_N)
    is_new_N = np.ones(len(sorted_N), bool)
    is_new_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return sorted_N[is_new_N]


@dataclasses.dataclass(frozen=True)
class Related:
    """Documents without near copies, and the name of the group of each.

    ``copies``: names of the near copies left out.
    """

    documents: tuple[Document, ...]
    groups: dict[str, str]
    copies: tuple[str, ...]


def without_copies(documents: Sequence[Document]) -> Related:
    """Leave out near copies and group related documents.

    A document is a near copy if a larger document that is kept (or one of equal size with an
    earlier name) contains 80 % of it. Kept documents below the same folder are one group, and so
    are those that share about 1,000 shingles or more.
    """
    shared, sizes = _shared_shingles(documents)
    kept: list[int] = []
    copies = set()
    for i in sorted(range(len(documents)), key=lambda i: (-documents[i].size, documents[i].name)):
        begin, end = shared.indptr[i : i + 2]
        common = dict(zip(shared.indices[begin:end], shared.data[begin:end], strict=True))
        most = max((common.get(j, 0) for j in kept), default=0)
        if sizes[i] and most >= COPY * sizes[i]:
            copies.add(i)
        else:
            kept.append(i)
    kept.sort()
    labels = _groups([documents[i] for i in kept], shared[kept][:, kept])
    groups = {documents[i].name: label for i, label in zip(kept, labels, strict=True)}
    names = tuple(documents[i].name for i in sorted(copies))
    return Related(tuple(documents[i] for i in kept), groups, names)


def _shared_shingles(documents: Sequence[Document]) -> tuple[Any, np.ndarray]:
    """Sampled shingles shared by each pair of documents (a sparse matrix), and of each document."""
    from scipy import sparse  # slow to import and seldom needed

    sketches = [_sketch(document.read()) for document in documents]
    sizes = np.array([len(sketch) for sketch in sketches])
    _, column = np.unique(np.concatenate(sketches), return_inverse=True)
    row = np.repeat(np.arange(len(documents)), sizes)
    has = sparse.csr_matrix((np.ones(len(row), np.int32), (row, column)))
    return (has @ has.T).tocsr(), sizes


def _sketch(data: bytes) -> np.ndarray:
    hashes = window_hashes(np.frombuffer(data, np.uint8), SHINGLE)
    return distinct(hashes[hashes >> np.uint64(64 - SAMPLED_BITS) == 0])


def _groups(documents: Sequence[Document], shared: Any) -> list[str]:
    """The group of each document, by the name of its first document."""
    from scipy import sparse

    first_below: dict[str, int] = {}
    top = [document.name.partition("/")[0] for document in documents]
    same_folder = [first_below.setdefault(name, i) for i, name in enumerate(top)]
    many = shared.tocoo()
    strong = many.data * (1 << SAMPLED_BITS) >= RELATED
    rows = np.concatenate([np.arange(len(documents)), many.row[strong]])
    columns = np.concatenate([same_folder, many.col[strong]])
    edges = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(documents),) * 2)
    _, label = sparse.csgraph.connected_components(edges, directed=False)
    first: dict[int, str] = {}
    return [first.setdefault(int(k), d.name) for k, d in zip(label, documents, strict=True)]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The share of held-out bytes inside windows of 50 bytes that occur in the training text.

    ``train_bytes`` and ``heldout_bytes`` were compared. ``complete``: these are all bytes. If they
    are not, comparing more of the training text can only raise the share.
    """

    share: float
    window: int
    train_bytes: int
    heldout_bytes: int
    complete: bool


def overlap(train: Sequence[Document], heldout: Sequence[Document]) -> Overlap:
    """Compare the sides of a split: at most 128 MiB of training text, 4 MiB of held-out text."""
    all_bytes = sum(document.size for document in (*train, *heldout))
    held = (text for text, _ in _stretches(heldout, MOST_HELDOUT, MOST_HELDOUT, 0))
    return shared_windows(_stretches(train, MOST_TRAIN, STRETCH, WINDOW - 1), held, all_bytes)


def shared_windows(
    train: Iterable[tuple[UInt8[np.ndarray, " N"], int]],
    heldout: Iterable[UInt8[np.ndarray, " M"]],
    all_bytes: int,
) -> Overlap:
    """Compare stretches of held-out text with stretches of training text.

    Those of the training text come with their own sizes, without bytes that are in the next one
    too. ``all_bytes``: bytes of both texts.
    """
    held = list(heldout)
    hashes = [window_hashes(text, WINDOW) for text in held]
    wanted = distinct(np.concatenate(hashes))
    # 24 bits of the hash suffice to discard most windows of the training text.
    likely = np.zeros(1 << 24, bool)
    likely[wanted >> np.uint64(40)] = True
    candidates, train_bytes = [], 0
    for text, size in train:
        train_bytes += size
        for begin in range(0, len(text), BLOCK):
            own = window_hashes(text[begin : begin + BLOCK + WINDOW - 1], WINDOW)
            candidates.append(distinct(own[likely[own >> np.uint64(40)]]))
    shared = np.intersect1d(wanted, distinct(np.concatenate(candidates)), assume_unique=True)
    covered = sum(_covered(len(x), h, shared) for x, h in zip(held, hashes, strict=True))
    heldout_bytes = sum(map(len, held))
    complete = train_bytes + heldout_bytes == all_bytes
    return Overlap(covered / heldout_bytes, WINDOW, train_bytes, heldout_bytes, complete)


def _covered(size: int, hashes: np.ndarray, shared: np.ndarray) -> int:
    """Bytes of a text inside windows whose hash is in ``shared``, which is sorted."""
    place = np.searchsorted(shared, hashes).clip(max=max(len(shared) - 1, 0))
    begins = np.flatnonzero(shared[place] == hashes) if len(shared) else np.zeros(0, np.int64)
    change = np.zeros(size + 1, np.int32)
    change[begins] += 1
    change[begins + WINDOW] -= 1
    return int(np.count_nonzero(np.cumsum(change[:-1])))


def _stretches(
    documents: Sequence[Document], most: int, stretch: int, beyond: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The documents in stretches; of more than `most` bytes, evenly spread stretches.

    Each is followed by up to `beyond` further bytes of its document and comes with its own size.
    """
    share = min(most / max(sum(document.size for document in documents), 1), 1.0)
    passed = taken = 0
    for document in documents:
        for begin in range(0, document.size, stretch):
            size = min(stretch, document.size - begin)
            if taken <= share * passed:
                taken += size
                whole = min(size + beyond, document.size - begin)
                part = dataclasses.replace(document, start=document.start + begin, size=whole)
                yield np.frombuffer(part.read(), np.uint8), size
            passed += size
