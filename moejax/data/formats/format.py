"""The contract of a file format that holds documents."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from moejax.data.documents import Document


class Span(NamedTuple):
    """A part of a file that can be read without the rest, in the format's own unit: bytes, row
    groups or records."""

    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Record:
    """A document: its text in UTF-8, and its place for messages, such as "web.jsonl.gz:17"."""

    place: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record without a text: its place, and the reason in words."""

    place: str
    reason: str


class Format(Protocol):
    """A file format. Its documents are numbered from 1 in messages, in the order of the file."""

    @property
    def name(self) -> str:
        """The format in words, such as "JSON lines, gzip"."""
        ...

    def spans(self, file: Document, size: int) -> list[Span]:
        """The file in consecutive spans of about ``size`` bytes of text; one span if the format
        can only be read from the beginning."""
        ...

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        """The documents that begin in a span, in order, with bounded memory.

        Raises:
          UserError: the file cannot be read at all, or has no such field or column.
        """
        ...
