"""One file of token ids, and the contract of a format of such files."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenArray:
    """The ids of one file, memory-mapped.

    Attributes:
      path: the file with the ids.
      field: the config field that names it.
      format: format and element type in words.
      tokens_N: ids of any integer type and byte order.
      start_D: position of the first token of each document, ascending; None if the file does not
        tell.
    """

    path: str
    field: str
    format: str
    tokens_N: Integer[np.ndarray, " N"]
    start_D: Int64[np.ndarray, " D"] | None = None


@runtime_checkable
class Format(Protocol):
    """A format of token arrays: one module of this package."""

    def matches(self, path: str) -> bool:
        """True if the file is of this format, by its name and first bytes. It may be damaged."""
        ...

    def read(self, path: str, field: str, vocab_size: int) -> TokenArray:
        """Map the file. ``vocab_size`` is that of tokenizer or model, 0 if neither is known.

        Raises UserError, naming field and path, for a file that is damaged or holds no ids.
        """
        ...


def map_ids(path: str, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """The elements of a file from byte ``offset`` on, memory-mapped; at least one must be there."""
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def read_head(path: str, size: int) -> bytes:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size)


def refused(field: str, path: str, what: str) -> UserError:
    """The error about one file: what is wrong with it, and the remedy."""
    return UserError(f"{field}: {path!r} {what}")
