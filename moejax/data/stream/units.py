"""Documents of files, in units that can be read for themselves and in any order."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from moejax.data.census import is_utf8
from moejax.data.documents import Document, character_start
from moejax.data.formats.files import data_files
from moejax.data.formats.format import Bad, Record, Span
from moejax.errors import UserError

UNIT = 1 << 22
"""Bytes of a unit where its format can be read from the middle. Units are read in a random order,
so that small ones mix a corpus well; a disk reads this much in a time that hides finding it."""

NEAR = 1 << 16
"""Bytes before a boundary in which a line's end is looked for."""


@runtime_checkable
class Units(Protocol):
    """Documents in units; memory holds the names of files, and none of their text.

    Attributes:
      name: of the whole, for people.
      field: the config field that names it.
      size: bytes on disk; 0 if that is not known.
      formats: of the files, in words.
    """

    @property
    def name(self) -> str: ...

    @property
    def field(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def formats(self) -> Sequence[str]: ...

    def __len__(self) -> int:
        """Number of units."""
        ...

    def read(self, unit: int, record: int = 0) -> Iterator[Record | Bad]:
        """The records of a unit from a certain one on, in order, with bounded memory."""
        ...

    def identity(self) -> Any:
        """Names, sizes and options that the text depends on, for the fingerprint; as for JSON."""
        ...


class FileUnits:
    """The documents of files, read by their formats.

    A unit is a span of a file: of about 4 MiB where the format can be read from the middle, the
    whole file where it cannot, as if compressed. A file of plain text is one document, or, above 4
    MiB, a document for each stretch of that size, which ends with a line.

    Raises:
      UserError: a file that is neither text nor of a known format.
    """

    def __init__(self, files: Sequence[Document], text_field: str, name: str) -> None:
        self.name, self.field, self._text_field = name, files[0].field, text_field
        self._files, self._formats = zip(*data_files(files), strict=True)
        self.size = sum(file.size for file in self._files)
        self._spans = [
            _stretches(file) if kind is None else kind.spans(file, UNIT)
            for file, kind in zip(self._files, self._formats, strict=True)
        ]
        self._ends = list(itertools.accumulate(map(len, self._spans)))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, unit: int, record: int = 0) -> Iterator[Record | Bad]:
        number = bisect.bisect_right(self._ends, unit)
        file, kind = self._files[number], self._formats[number]
        span = self._spans[number][unit - self._ends[number]]  # counted from the end
        records = _plain(file, span) if kind is None else kind.read(file, span, self._text_field)
        return itertools.islice(records, record, None)

    def identity(self) -> Any:
        return [self._text_field, [[file.name, file.size] for file in self._files]]

    @property
    def formats(self) -> Sequence[str]:
        """The formats of the files, in words."""
        return sorted({kind.name if kind else "text" for kind in self._formats})


def _stretches(file: Document) -> list[Span]:
    ends = [*range(UNIT, file.size, UNIT), file.size]
    return [Span(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _plain(file: Document, span: Span) -> Iterator[Record]:
    """A stretch of a plain text as one record."""
    begin, end = _boundary(file, span.begin), _boundary(file, span.end)
    part = dataclasses.replace(file, start=file.start + begin, size=end - begin)
    whole = end - begin == file.size
    yield Record(file.name if whole else f"{file.name} at byte {begin}", part.read())


def _boundary(file: Document, at: int) -> int:
    """The place near byte ``at`` where a stretch ends: after a line if one ends just before."""
    if at in (0, file.size):
        return at
    begin = max(at - NEAR, 0)
    near = dataclasses.replace(file, start=file.start + begin, size=at + 1 - begin).read()
    newline = near.rfind(b"\n", 0, at - begin)
    return begin + (newline + 1 if newline >= 0 else character_start(near, at - begin))


@dataclasses.dataclass(frozen=True)
class Reader:
    """The records of texts that hold a text.

    Attributes:
      texts: the documents.
      skip: leave out records that cannot be read; otherwise they are errors.
      utf8: bytes that are not UTF-8 cannot be read.
      report: gets a line about each record that is left out.
    """

    texts: Units
    skip: bool
    utf8: bool
    report: Callable[[str], None]

    def read(self, unit: int, record: int = 0) -> Iterator[tuple[int, Record]]:
        """The records of a unit with their numbers, from a number on. Empty ones are left out.

        Raises:
          UserError: a record that cannot be read, unless these are skipped.
        """
        for number, found in enumerate(self.texts.read(unit, record), record):
            if isinstance(found, Record) and self.utf8 and not is_utf8(found.data):
                found = Bad(found.place, "is not UTF-8")
            if isinstance(found, Record):
                if found.data:
                    yield number, found
            elif self.skip:
                self.report(f"{found.place} {found.reason}")
            else:
                raise UserError(
                    f"{self.texts.field}: {found.place} {found.reason}; repair it, or set "
                    "data.on_error=skip to leave such records out"
                )
