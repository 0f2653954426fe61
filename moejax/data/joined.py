"""Several arrays as one, without copying."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Integer, UInt


class Joined:
    """Read-only concatenation of one-dimensional arrays, which may be memory-mapped.

    Slices and elements have the given element type, whatever that of the parts is. A slice is a
    view where it lies in one part of that type, and a copy otherwise; only its own elements are
    read.
    """

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray], dtype: np.dtype):
        self._parts = [part for part in parts if len(part)]
        self._end_P = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return int(self._end_P[-1]) if len(self._end_P) else 0

    @property
    def size(self) -> int:
        return len(self)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, key: Any) -> Any:
        """A slice, an element, or the elements at an array of positions."""
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step != 1:
                return self[:][key]
            return self._read(begin, max(begin, end))
        at = np.asarray(key)
        if at.dtype.kind not in "iu":
            raise TypeError(f"index {key!r}: a slice, an integer or an array of integers")
        return self._take(at)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All elements, in memory."""
        return np.array(self[:], dtype=dtype, copy=copy)

    def view(self, begin: int, end: int) -> "Joined":
        """The elements from ``begin`` to ``end``, again without copying."""
        return Joined([part[a:b] for part, a, b in self._overlaps(begin, end)], self.dtype)

    def _overlaps(self, begin: int, end: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Parts that hold elements of [begin, end), with the bounds of these in the part."""
        first = int(np.searchsorted(self._end_P, begin, side="right"))
        for part, stop in zip(self._parts[first:], self._end_P[first:].tolist(), strict=True):
            start = stop - len(part)
            if start >= end:
                return
            yield part, max(begin - start, 0), min(end, stop) - start

    def _read(self, begin: int, end: int) -> np.ndarray:
        pieces = [
            np.asarray(part[a:b]).astype(self.dtype, copy=False)
            for part, a, b in self._overlaps(begin, end)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def _take(self, at: np.ndarray) -> np.ndarray:
        at = np.where(at < 0, at + len(self), at).astype(np.int64)
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"index out of range for {len(self)} elements")
        result = np.empty(at.shape, self.dtype)
        owner = np.searchsorted(self._end_P, at, side="right")
        for index in np.unique(owner):
            part, mine = self._parts[index], owner == index
            result[mine] = part[at[mine] - (int(self._end_P[index]) - len(part))]
        return result


class TokenSizes:
    """Bytes of each token of a stream, looked up when they are read.

    ``size_V`` has the bytes of each token id.
    """

    ndim = 1

    def __init__(self, tokens_N: Any, size_V: np.ndarray):
        self._tokens_N, self._size_V = tokens_N, size_V
        self.dtype = size_V.dtype

    def __len__(self) -> int:
        return len(self._tokens_N)

    @property
    def size(self) -> int:
        return len(self)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, key: Any) -> Any:
        return self._size_V[self._tokens_N[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)


if TYPE_CHECKING:  # what the code asks of a stream, the classes above have too
    Tokens = Sizes = np.ndarray
else:
    Tokens = Integer[np.ndarray, " _"] | Joined
    """A stream of token ids: one array, or several files as one."""
    Sizes = UInt[np.ndarray, " _"] | TokenSizes
    """Bytes of the tokens of a stream."""
