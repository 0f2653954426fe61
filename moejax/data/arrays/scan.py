"""One pass over the ids of an array: all within the vocabulary, and where separators stand."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from moejax.data.arrays.array import TokenArray
from moejax.errors import UserError

CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Limit:
    """A vocabulary that ids must be below, and the config field that sets it.

    ``size`` is 0 where none is known.
    """

    size: int
    field: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """Findings about one array.

    Attributes:
      largest: the largest id.
      place_N: positions of each separator that was looked for, by id.
      closing: the id that ends every document of the array's own index and stands nowhere else;
        None if there is no such id, or no index.
    """

    largest: int
    place_N: dict[int, Int64[np.ndarray, " S"]]
    closing: int | None


def scan(array: TokenArray, limit: Limit, separators: Sequence[int] = ()) -> Scan:
    """Read all ids once, in chunks.

    Raises UserError, with position and id, for the first id that is negative or not in the
    vocabulary.
    """
    tokens_N, largest = array.tokens_N, 0
    places: dict[int, list[np.ndarray]] = {separator: [] for separator in separators}
    closing, last_D = None, np.zeros(0, np.int64)
    if array.start_D is not None:
        last_D = np.append(array.start_D[1:], len(tokens_N)) - 1
        closing = int(tokens_N[last_D[0]])
    for begin in range(0, len(tokens_N), CHUNK):
        chunk = np.asarray(tokens_N[begin : begin + CHUNK])
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or (limit.size and high >= limit.size):
            wrong = (chunk < 0) | (chunk >= limit.size) if limit.size else chunk < 0
            at = int(np.argmax(wrong))
            raise _outside(array, limit, begin + at, int(chunk[at]))
        largest = max(largest, high)
        for separator, found in places.items():
            found.append(begin + np.flatnonzero(chunk == separator))
        if closing is not None:
            first, stop = np.searchsorted(last_D, (begin, begin + len(chunk)))
            if not np.array_equal(np.flatnonzero(chunk == closing), last_D[first:stop] - begin):
                closing = None
    place_N = {separator: np.concatenate(found) for separator, found in places.items()}
    return Scan(largest, place_N, closing)


def _outside(array: TokenArray, limit: Limit, at: int, token: int) -> UserError:
    where = (
        f"{array.field}: {array.path!r}, read as {array.format}, has the id {token} at token {at}"
    )
    if token < 0:
        return UserError(f"{where}, and ids are not negative; write the file again")
    remedy = "raise it, or set 0 to take the largest id + 1"
    if limit.field.startswith("data.tokenizer"):
        remedy = "name the tokenizer that made the ids"
    return UserError(f"{where}, but ids are below {limit.size} ({limit.field}); {remedy}")
