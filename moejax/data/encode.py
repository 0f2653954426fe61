"""Units of work to tokens: the same function in memory and in the processes of `data prepare`."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt, UInt64

from moejax.data.census import Census, is_utf8
from moejax.data.documents import Document, Piece, cut
from moejax.data.formats.format import Bad, Place, Record
from moejax.data.tokenizers.interface import SIZE, Tokenizer, token_dtype
from moejax.data.units import TRAIN, Unit
from moejax.errors import UserError

FAIL, SKIP = "fail", "skip"
BYTES = 256
"""The size of the vocabulary of bytes, which are tokens of any text."""
CHUNK = 32 << 20
BATCH = 8 << 20
"""Bytes of text that a tokenizer gets at once, for its own threads."""
_SALT = b"moejax documents"


class Reading(NamedTuple):
    """The reading of records as texts.

    ``text_field``: the field or column with the text. ``on_error``: "fail" or "skip", for records
    that have no text.
    """

    text_field: str = "text"
    on_error: str = FAIL


@dataclasses.dataclass
class Troubles:
    """Numbers of records without a text, and of empty documents; both are left out."""

    bad: int = 0
    empty: int = 0

    def join(self, other: "Troubles") -> None:
        """Add those of a later chunk."""
        self.bad += other.bad
        self.empty += other.empty


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Documents of a unit.

    Attributes:
      token_N: tokens of all documents, one after the other.
      length_D: tokens of each document.
      size_D: its bytes.
      digest_D2: 128 bits of BLAKE2b over its bytes.
      size_N: bytes of each token; None if the tokenizer's table has them, or the side is training.
      unit: number of the unit.
    """

    side: str
    token_N: UInt[np.ndarray, " N"]
    length_D: Int64[np.ndarray, " D"]
    size_D: Int64[np.ndarray, " D"]
    digest_D2: UInt64[np.ndarray, "D 2"]
    size_N: UInt[np.ndarray, " N"] | None
    census: Census
    troubles: Troubles
    unit: int = 0

    def bare(self) -> "Encoded":
        """The same without tokens."""
        return dataclasses.replace(self, token_N=self.token_N[:0].copy(), size_N=None)


def encode_unit(
    unit: Unit, tokenizer: Tokenizer, reading: Reading, number: int = 0
) -> Iterator[Encoded]:
    """Read and tokenise the documents of a unit, in chunks of about ``CHUNK`` bytes of text.

    ``number``: that of the unit.

    Raises:
      UserError: a file that cannot be read; a record without a text, unless these are skipped.
    """
    sized = unit.side != TRAIN and not tokenizer.is_byte_level
    chunk = _Chunk(unit.side, token_dtype(tokenizer.vocab_size), sized, number)
    characters = tokenizer.vocab_size != BYTES
    for batch in batches(pieces_of(unit, reading, lambda: chunk.troubles, characters)):
        for piece, ids in zip(batch, tokenizer.encode(batch), strict=True):
            if piece.is_first and chunk.bytes >= CHUNK:
                yield chunk.taken()
            chunk.add(piece, ids, tokenizer.sizes(piece, ids) if sized else None)
    yield chunk.taken()


class _Chunk:
    """The documents of a unit that were read since the last chunk."""

    def __init__(self, side: str, dtype: np.dtype, sized: bool, number: int):
        self.side, self.dtype, self.sized, self.number = side, dtype, sized, number
        self._clear()

    def _clear(self) -> None:
        self.census, self.troubles = Census(), Troubles()
        self.bytes = 0
        self._tokens: list[np.ndarray] = [np.zeros(0, self.dtype)]
        self._sizes: list[np.ndarray] = [np.zeros(0, SIZE)]
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._hashes: list[Any] = []

    def add(self, piece: Piece, ids: np.ndarray, sizes: np.ndarray | None) -> None:
        self.census.add(piece)
        if piece.is_first:
            self._lengths.append(0)
            self._bytes.append(piece.document.size)
            self._hashes.append(hashlib.blake2b(digest_size=16, person=_SALT))
        self._hashes[-1].update(piece.data)
        self._lengths[-1] += len(ids)
        self._tokens.append(ids.astype(self.dtype))
        if sizes is not None:
            self._sizes.append(sizes)
        self.bytes += len(piece.data)

    def taken(self) -> Encoded:
        """The documents so far, which the chunk forgets."""
        digests = b"".join(hashed.digest() for hashed in self._hashes)
        encoded = Encoded(
            side=self.side,
            token_N=np.concatenate(self._tokens),
            length_D=np.array(self._lengths, np.int64),
            size_D=np.array(self._bytes, np.int64),
            digest_D2=np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64),
            size_N=np.concatenate(self._sizes) if self.sized else None,
            census=self.census,
            troubles=self.troubles,
            unit=self.number,
        )
        self._clear()
        return encoded


def texts_of(unit: Unit, reading: Reading, characters: bool) -> Iterator[Record | Bad]:
    """The records of a unit.

    ``characters``: whether text that is not UTF-8 is a bad record, as it is for all tokenizers but
    bytes. Of plain text that must not be skipped the tokenizer says so itself.
    """
    check = characters and (unit.format is not None or reading.on_error == SKIP)
    for text in unit.texts(reading.text_field):
        if check and isinstance(text, Record) and not is_utf8(text.data):
            yield Bad(text.place, "it is not UTF-8")
        else:
            yield text


def pieces_of(
    unit: Unit, reading: Reading, troubles: Callable[[], Troubles], characters: bool
) -> Iterator[Piece]:
    """The documents of a unit in pieces, without those that are empty or, if these are skipped,
    cannot be read.

    ``troubles``: where to count these; ``characters``: see ``texts_of``.

    Raises:
      UserError: a file or a record that cannot be read.
    """
    file = unit.files[0]
    for text in texts_of(unit, reading, characters):
        if isinstance(text, Bad):
            if reading.on_error == FAIL:
                raise UserError(
                    f"{file.field}: {text.place}: {text.reason}; repair it, or set "
                    "data.on_error=skip to leave such records out"
                )
            troubles().bad += 1
        elif not text.data:
            troubles().empty += 1
        else:
            # Of records, messages about the encoding name the file: counting lines may take long.
            name = text.place.name if isinstance(text.place, Place) else text.place
            own = Document(name, name, len(text.data), field=file.field)
            yield from cut(own, text.data)


def first_bad(unit: Unit, reading: Reading, characters: bool) -> str:
    """The first bad record of a unit, which has one, and the reason.

    It is looked for only when it is shown: a span does not know how many lines precede it.
    """
    texts = texts_of(unit, reading, characters)
    bad = next(text for text in texts if isinstance(text, Bad))
    return f"{bad.place}: {bad.reason}"


def batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about ``BATCH`` bytes."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
