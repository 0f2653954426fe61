"""Units of work to tokens: the same function in memory and in the processes of `data prepare`."""

import codecs
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt, UInt64

from moejax.data.census import Census, is_utf8
from moejax.data.documents import Document, Piece, cut, gathered, pieces
from moejax.data.formats.format import Bad, Record
from moejax.data.tokenizers.interface import SIZE, Tokenizer, token_dtype
from moejax.data.units import TRAIN, Unit
from moejax.errors import UserError

FAIL, SKIP = "fail", "skip"
BYTES = 256
"""The size of the vocabulary of bytes, which are tokens of any text."""
CHUNK = 16 << 20
"""Bytes of text in a chunk, about, whose tokens memory holds at once."""
BATCH = 8 << 20
"""Bytes of text that a tokenizer gets at once, for its own threads."""
NOT_UTF8 = "it is not UTF-8"
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
    """Documents of a unit. A long one may begin or end in another chunk.

    Attributes:
      token_N: tokens of all documents, one after the other.
      length_S: tokens of each document in this chunk: of one more than D if the last one ends
        later.
      opens: false if the first one began earlier.
      length_D: tokens of each document that ends here, in all.
      size_D: its bytes.
      digest_D2: 128 bits of BLAKE2b over its bytes.
      size_N: bytes of each token; None if the tokenizer's table has them, or the side is training.
      unit: number of the unit.
    """

    side: str
    token_N: UInt[np.ndarray, " N"]
    length_S: Int64[np.ndarray, " S"]
    opens: bool
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
    for batch in gathered(pieces_of(unit, reading, lambda: chunk.troubles, characters), BATCH):
        for piece, ids in zip(batch, tokenizer.encode(batch), strict=True):
            if chunk.bytes >= CHUNK:
                yield chunk.taken(is_end=piece.is_first)
            chunk.add(piece, ids, tokenizer.sizes(piece, ids) if sized else None)
    yield chunk.taken(is_end=True)


class _Chunk:
    """The documents of a unit that were read since the last chunk."""

    def __init__(self, side: str, dtype: np.dtype, sized: bool, number: int):
        self.side, self.dtype, self.sized, self.number = side, dtype, sized, number
        self._document: _Open | None = None
        self.census = Census()
        self._clear()

    def _clear(self) -> None:
        self.census, self.troubles = self.census.following(), Troubles()
        self.bytes = 0
        self.opens = self._document is None
        self._tokens: list[np.ndarray] = [np.zeros(0, self.dtype)]
        self._sizes: list[np.ndarray] = [np.zeros(0, SIZE)]
        self._stretches: list[int] = []
        self._ended: list[tuple[int, int]] = []
        self._digests = bytearray()

    def add(self, piece: Piece, ids: np.ndarray, sizes: np.ndarray | None) -> None:
        self.census.add(piece)
        if piece.is_first:
            self._end()
            self._document = _Open(piece.document.size)
        if piece.is_first or not self._stretches:
            self._stretches.append(0)
        assert self._document is not None
        self._document.hash.update(piece.data)
        self._document.length += len(ids)
        self._stretches[-1] += len(ids)
        wide = ids.itemsize > self.dtype.itemsize
        self._tokens.append(ids.astype(self.dtype) if wide else ids)
        if sizes is not None:
            self._sizes.append(sizes)
        self.bytes += len(piece.data)

    def _end(self) -> None:
        """The document is over."""
        if self._document is not None:
            self._ended.append((self._document.length, self._document.size))
            self._digests += self._document.hash.digest()
            self._document = None

    def taken(self, is_end: bool) -> Encoded:
        """Give all that was read so far, and forget it; ``is_end``: the document ends with it."""
        if is_end:
            self._end()
        ended_D2 = np.array(self._ended, np.int64).reshape(-1, 2)
        encoded = Encoded(
            side=self.side,
            token_N=np.concatenate(self._tokens, dtype=self.dtype),
            length_S=np.array(self._stretches, np.int64),
            opens=self.opens,
            length_D=ended_D2[:, 0].copy(),
            size_D=ended_D2[:, 1].copy(),
            digest_D2=np.frombuffer(self._digests, ">u8").reshape(-1, 2).astype(np.uint64),
            size_N=np.concatenate(self._sizes) if self.sized else None,
            census=self.census,
            troubles=self.troubles,
            unit=self.number,
        )
        self._clear()
        return encoded


class _Open:
    """A document that has not ended yet."""

    def __init__(self, size: int):
        self.size, self.length = size, 0
        self.hash = hashlib.blake2b(digest_size=16, person=_SALT)


def pieces_of(
    unit: Unit, reading: Reading, troubles: Callable[[], Troubles], characters: bool
) -> Iterator[Piece]:
    """The documents of a unit in pieces, without those that are empty or, if these are skipped,
    cannot be read.

    ``troubles``: where to count these; ``characters``: whether text that is not UTF-8 cannot be
    read, as by all tokenizers but bytes.

    Raises:
      UserError: a file or a record that cannot be read.
    """
    if unit.format is None:
        for file in unit.files:
            # Of text that must not be skipped the tokenizer itself says that it is not UTF-8.
            if characters and reading.on_error == SKIP and not _is_utf8_file(file):
                troubles().bad += 1
            else:
                yield from pieces([dataclasses.replace(file, name=file.path)])
        return
    for file, text in _records(unit, reading, characters):
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
            # Messages about the encoding name the file: counting its lines may take long.
            own = Document(file.name, file.path, len(text.data), field=file.field)
            yield from cut(own, text.data)


def bad_records(unit: Unit, reading: Reading, characters: bool) -> Iterator[str]:
    """The bad records of a unit, each with its place and the reason.

    They are looked for only when they are shown: a span does not know how many lines precede it.
    """
    if unit.format is None:
        for file in unit.files:
            if characters and not _is_utf8_file(file):
                yield f"{file.path}: {NOT_UTF8}"
        return
    for _, text in _records(unit, reading, characters):
        if isinstance(text, Bad):
            yield f"{text.place}: {text.reason}"


def place_of(unit: Unit, reading: Reading, characters: bool, number: int) -> str:
    """The place of a document of a unit, of those that are kept, counted from 0."""
    if unit.format is None:
        return unit.files[number].path
    kept = (
        text.place
        for _, text in _records(unit, reading, characters)
        if isinstance(text, Record) and text.data
    )
    return str(next(itertools.islice(kept, number, None)))


def _records(
    unit: Unit, reading: Reading, characters: bool
) -> Iterator[tuple[Document, Record | Bad]]:
    for file, text in unit.records(reading.text_field):
        if characters and isinstance(text, Record) and not is_utf8(text.data):
            yield file, Bad(text.place, NOT_UTF8)
        else:
            yield file, text


def _is_utf8_file(file: Document) -> bool:
    """True if a file is UTF-8, of which memory holds a piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in pieces([file]):
            decoder.decode(piece.data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
