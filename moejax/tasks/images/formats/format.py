"""The contract of a file format that holds labelled pictures."""

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32

from moejax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""Suffixes of picture files."""


class Picture(NamedTuple):
    """A picture before decoding.

    ``place`` names it in messages: its file, or the file that holds it and its number, from 1, such
    as "train-000000.tar:17". ``content`` is a path, the bytes of a picture file, or pixels,
    uint8[H, W] (grey) or uint8[H, W, 3] (RGB).
    """

    place: str
    content: str | bytes | np.ndarray


class Labels(NamedTuple):
    """Labels of the pictures in one file: numbers or words, and the names of the classes.

    With ``names`` a label is a number and an index into them. Without, the classes are the labels
    that occur.
    """

    values: Sequence[int] | Sequence[str]
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one side, unread. ``stream`` reads them in the order of the labels; the caller
    keeps as many as it needs."""

    label_N: Int32[np.ndarray, " N"]
    stream: Callable[[], Iterator[Picture]]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Pictures at a path. ``heldout`` is None if there is no split; ``source`` describes the files
    in words, and is empty for a folder per class."""

    classes: tuple[str, ...]
    train: Pictures
    heldout: Pictures | None
    source: str = ""


class Format(Protocol):
    """A format whose files hold many pictures each, in an order."""

    @property
    def name(self) -> str:
        """The format in words, such as "Parquet"."""
        ...

    def owns(self, path: str) -> bool:
        """True for a file of pictures of this format, by its name."""
        ...

    def side(self, name: str) -> str:
        """The side of the split that a file is on by its name below ``data.path``, or ""."""
        ...

    def companions(self, name: str) -> tuple[str, ...]:
        """Names of the files that make up its set, itself included; they are in one folder. Empty
        if the name does not tell.

        ``name`` has no folder.
        """
        ...

    def labels(self, path: str) -> Labels:
        """The labels of the pictures of a file, in order. Reads no pixels.

        Raises:
          UserError: a damaged file, or a picture without a label.
        """
        ...

    def pictures(self, path: str) -> Iterator[Picture]:
        """The pictures of a file, in order, with bounded memory.

        Raises:
          UserError: a damaged file, or a record without a picture.
        """
        ...


@contextlib.contextmanager
def reading(path: str, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of reading ``path``, and those of its library, into one line.

    ``what``: the format with its article, such as "a Parquet file".
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, *errors) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"data.path: cannot read {path!r}: {error.strerror}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise damaged(path, what, reason) from error


def most_bytes(path: str, packed: bool) -> int:
    """A bound for the content of a file, against sizes in damaged headers, which may be anything.

    Deflate makes at most 1032 bytes of one.
    """
    return os.path.getsize(path) * (1032 if packed else 1)


def damaged(path: str, what: str, reason: str) -> UserError:
    """The error about a file that is not, or no longer, what its name says."""
    return UserError(
        f"data.path: {path!r} is not {what} that can be read ({reason}); copy or download it again"
    )
