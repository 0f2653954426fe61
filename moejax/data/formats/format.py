"""The contract of a file format that holds documents."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from moejax.data.documents import Document


class Span(NamedTuple):
    """A part of a file that can be read without the rest, in the format's own unit: bytes, row
    groups or records."""

    begin: int
    end: int


def spans_of(sizes: Iterable[int], size: int) -> list[Span]:
    """Consecutive parts of a file, such as row groups, gathered into spans of about ``size``."""
    spans, begin, total, end = [], 0, 0, 0
    for end, part in enumerate(sizes, 1):
        total += part
        if total >= size:
            spans.append(Span(begin, end))
            begin, total = end, 0
    return [*spans, Span(begin, end)] if begin < end else spans


class Place(NamedTuple):
    """The place of a document for messages, such as "web.jsonl:17".

    A span does not know how many lines or rows precede it. They are counted when a place is turned
    into text, which reads the file up to the span: do that only for places that are shown.

    ``name``: the file's name. ``unit``: "line", "row" or "record". ``number``: the number in the
    span, from 1. ``before``: counts the units that precede the span; None if there are none.
    """

    name: str
    unit: str
    number: int
    before: Callable[[], int] | None = None

    def __str__(self) -> str:
        number = self.number + (self.before() if self.before else 0)
        return (
            f"{self.name}:{number}" if self.unit == "line" else f"{self.name}, {self.unit} {number}"
        )


class Record(NamedTuple):
    """A document: its text in UTF-8, and its place, which ``str`` turns into words."""

    place: Place | str
    data: bytes


class Bad(NamedTuple):
    """A record without a text: its place, and the reason in words."""

    place: Place | str
    reason: str


@runtime_checkable
class Format(Protocol):
    """A file format. Its documents are numbered from 1 in messages, in the order of the file.

    Formats are values: they can be compared, and sent to other processes.
    """

    @property
    def name(self) -> str:
        """The format in words, such as "JSON lines, gzip"."""
        ...

    def spans(self, file: Document, size: int) -> list[Span]:
        """The file in consecutive spans of about ``size`` bytes of text; one span if the format
        can only be read from the beginning, or is damaged."""
        ...

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        """The documents that begin in a span, in order, with bounded memory.

        Damage ends the documents of a span with one ``Bad``.

        Raises:
          UserError: the file cannot be opened, or has no such column.
        """
        ...
