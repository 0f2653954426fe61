"""Records to token ids, a few at a time."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt

from moejax.data.documents import Document, cut
from moejax.data.formats.format import Record
from moejax.data.tokenizers.interface import Tokenizer, token_dtype
from moejax.errors import UserError

GATHERED = 1 << 20
"""Bytes of short documents that are gathered for a tokenizer that works in parallel."""


class Numbered(NamedTuple):
    """A record, the position of its unit in the order of reading, and its number in the unit."""

    unit: int
    number: int
    record: Record


class Encoded(NamedTuple):
    """The token ids of a document, and where it is, as in `Numbered`."""

    unit: int
    number: int
    token_N: UInt[np.ndarray, " N"]


def encoded(records: Iterable[Numbered], tokenizer: Tokenizer, field: str) -> Iterator[Encoded]:
    """The documents as tokens, in order."""
    gathered: list[Numbered] = []
    size = 0
    for each in records:
        gathered.append(each)
        size += len(each.record.data)
        if size >= GATHERED:
            yield from _encode(gathered, tokenizer, field)
            gathered, size = [], 0
    yield from _encode(gathered, tokenizer, field)


def sized(
    record: Record, tokenizer: Tokenizer, field: str
) -> tuple[UInt[np.ndarray, " N"], UInt[np.ndarray, " N"]]:
    """A document's tokens, and the bytes that each of them encodes."""
    place = str(record.place)
    pieces = list(cut(Document(place, place, len(record.data), field=field), record.data))
    tokens = [ids.astype(token_dtype(tokenizer.vocab_size)) for ids in tokenizer.encode(pieces)]
    sizes = [tokenizer.sizes(piece, own) for piece, own in zip(pieces, tokens, strict=True)]
    return np.concatenate(tokens), np.concatenate(sizes)


def _encode(gathered: list[Numbered], tokenizer: Tokenizer, field: str) -> Iterator[Encoded]:
    nameless = Document("", "", 0, field=field)
    pieces = [list(cut(nameless, each.record.data)) for each in gathered]
    try:
        token_ids = iter(tokenizer.encode([piece for own in pieces for piece in own]))
    except UserError:  # a place in words may cost reading a file, so that only this one is asked
        for each in gathered:
            sized(each.record, tokenizer, field)
        raise
    dtype = token_dtype(tokenizer.vocab_size)
    for each, own in zip(gathered, pieces, strict=True):
        tokens = np.concatenate([next(token_ids).astype(dtype) for _ in own])
        yield Encoded(each.unit, each.number, tokens)
