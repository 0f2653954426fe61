"""Arrays as the two streams of a corpus, with the documents in them where they are known."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from moejax.data.arrays.array import TokenArray
from moejax.data.arrays.scan import Scan
from moejax.data.joined import Joined
from moejax.errors import UserError

UNKNOWN = -1
"""The separator of a corpus in which none was found."""
MOST_OFF = 2
"""Factor by which a held-out side may miss its share to begin where a document begins."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The tokens of one side, and the first tokens of its documents; None: not known."""

    tokens_N: Joined
    start_D: Int64[np.ndarray, " D"] | None

    @property
    def documents(self) -> int:
        return 0 if self.start_D is None else len(self.start_D)

    def view(self, begin: int, end: int) -> "Stream":
        """A part of the stream. If it begins inside a document, the rest of that comes first."""
        start_D = self.start_D
        if start_D is not None:
            inside = start_D[(start_D >= begin) & (start_D < end)] - begin
            cuts = bool(begin) and begin not in start_D
            start_D = np.concatenate([np.zeros(int(cuts), np.int64), inside])
        return Stream(self.tokens_N.view(begin, end), start_D)

    def without_last(self, separator: int) -> "Stream":
        """The stream without a separator at its end: separators stand between documents."""
        size = len(self.tokens_N)
        if self.start_D is None or size < 2 or int(self.tokens_N[size - 1]) != separator:
            return self
        return self.view(0, size - 1)

    def opens_with(self, token: int) -> bool:
        """True if every document but the first, whose beginning may be missing, begins with it."""
        start_D = self.start_D
        return start_D is not None and bool(np.all(self.tokens_N[start_D[1:]] == token))


def find_separator(
    arrays: Sequence[TokenArray], scans: Sequence[Scan], candidates: Sequence[int]
) -> int:
    """The id that stands between documents, or ``UNKNOWN``.

    Where all arrays have an index of documents, the id that ends every document and stands nowhere
    else; otherwise the first of ``candidates`` that occurs.
    """
    if all(array.start_D is not None for array in arrays):
        closing = {scan.closing for scan in scans}
        (only,) = closing if len(closing) == 1 else (None,)
        return UNKNOWN if only is None else only
    return next((c for c in candidates if any(len(scan.place_N[c]) for scan in scans)), UNKNOWN)


def join(
    arrays: Sequence[TokenArray], scans: Sequence[Scan], separator: int, dtype: np.dtype
) -> Stream:
    """One stream of several arrays."""
    tokens_N = Joined([array.tokens_N for array in arrays], dtype)
    offset_P = np.cumsum([0, *(len(array.tokens_N) for array in arrays)])
    indexed = all(array.start_D is not None for array in arrays)
    if not arrays or not (indexed or separator != UNKNOWN):
        return Stream(tokens_N, None)
    if indexed:
        parts = [a.start_D + at for a, at in zip(arrays, offset_P, strict=False)]  # type: ignore  # none is None
        return Stream(tokens_N, np.concatenate(parts))
    places = [scan.place_N[separator] + at for scan, at in zip(scans, offset_P, strict=False)]
    after = np.concatenate(places) + 1
    first = np.zeros(int(int(tokens_N[0]) != separator), np.int64)
    return Stream(tokens_N, np.concatenate([first, after[after < len(tokens_N)]]))


def hold_out(stream: Stream, eval_fraction: float) -> tuple[Stream, Stream, str]:
    """The stream in two, and the rule in words: the last ``eval_fraction`` of its tokens.

    The held-out side begins with the document that begins nearest to that place, if documents are
    known and this leaves it at least half and at most twice its share.

    Raises UserError for a stream of fewer than two tokens.
    """
    size = len(stream.tokens_N)
    if size < 2:
        raise UserError(
            f"data.path: it holds {size} token; nothing is left to hold out, so give more"
        )
    wanted = min(max(round(eval_fraction * size), 1), size - 1)
    cut, rule = size - wanted, f"the last {100 * eval_fraction:.3g}% of the tokens"
    if stream.start_D is not None:
        start_D = stream.start_D[stream.start_D > 0]
        held_D = size - start_D
        start_D = start_D[(held_D * MOST_OFF >= wanted) & (held_D <= wanted * MOST_OFF)]
        if len(start_D):
            cut = int(start_D[np.argmin(np.abs(start_D - cut))])
            rule += ", from where a document begins"
    return stream.view(0, cut), stream.view(cut, size), rule
