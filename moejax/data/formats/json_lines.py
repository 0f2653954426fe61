"""JSON lines: one JSON object per line, whose field `data.text_field` is a document."""

import dataclasses
import functools
import io
from collections.abc import Iterator

from moejax.data.documents import Document
from moejax.data.formats.compression import CHUNK, Compression, Damaged, open_bytes
from moejax.data.formats.format import Bad, Place, Record, Span
from moejax.data.formats.records import BOM, LONGEST, TOO_LONG, json_text
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Files of JSON lines. Empty lines are no records, but they are counted.

    Spans are bytes; a span owns the lines that begin in it. A compressed file is one span.
    """

    compression: Compression | None = None

    @property
    def name(self) -> str:
        return f"JSON lines, {self.compression.name}" if self.compression else "JSON lines"

    def spans(self, file: Document, size: int) -> list[Span]:
        if self.compression:
            return [Span(0, file.size)]
        return [
            Span(begin, min(begin + size, file.size)) for begin in range(0, file.size, max(size, 1))
        ]

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        number, name = 0, file.name
        begin, end = span if self.compression is None else (0, None)
        before = functools.partial(lines_before, file.path, begin) if begin else None
        try:
            with open_bytes(file.path, self.compression) as stream:
                at = _first_line(stream, begin, span.end)
                while end is None or at < end:
                    line = stream.readline(LONGEST)
                    if not line:
                        break
                    at, number = at + len(line), number + 1
                    if line.isspace():
                        continue
                    if len(line) == LONGEST and line[-1:] != b"\n":
                        at += _skip_line(stream)
                        yield Bad(Place(name, "line", number, before), TOO_LONG)
                        continue
                    line = line.removeprefix(BOM).rstrip(b"\r\n")
                    text = json_text(line, text_field)
                    place = Place(name, "line", number, before)
                    yield Record(place, text) if type(text) is bytes else Bad(place, str(text))
        except Damaged as error:
            reason = f"{error}; this line and those after it are lost"
            yield Bad(Place(name, "line", number + 1), reason)
        except OSError as error:
            raise UserError(
                f"{file.field}: cannot read {file.path!r}: {error.strerror or error}"
            ) from error


def _first_line(stream: io.BufferedReader, begin: int, end: int) -> int:
    """Move to the first line that begins at ``begin`` or later; its position, or one from ``end``
    on if there is none in the span."""
    if begin == 0:
        return 0
    stream.seek(begin - 1)
    at = begin - 1
    while at < end:
        part = stream.readline(CHUNK)
        at += len(part)
        if not part or part.endswith(b"\n"):
            break
    return at


def _skip_line(stream: io.BufferedReader) -> int:
    """Read to the end of a line; the number of bytes read."""
    skipped = 0
    while part := stream.readline(CHUNK):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def lines_before(path: str, end: int) -> int:
    """The number of lines of a file that begin before byte ``end``, which is not 0."""
    count, end = 1, end - 1
    with open(path, "rb", buffering=0) as file:
        while end > 0 and (part := file.read(min(end, 1 << 22))):
            count += part.count(b"\n")
            end -= len(part)
    return count
