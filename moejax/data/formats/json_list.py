"""A JSON list of objects, whose field `data.text_field` is a document each."""

import dataclasses
import io
import re
from collections.abc import Iterator

from moejax.data.documents import Document
from moejax.data.formats.compression import CHUNK, Compression, Damaged, open_bytes
from moejax.data.formats.format import Bad, Place, Record, Span
from moejax.data.formats.records import BOM, LONGEST, TOO_LONG, json_text
from moejax.errors import UserError

_INNER, _OUTER = re.compile(rb'["{}\[\]]'), re.compile(rb'["{}\[\],]')
"""Characters outside of strings that matter inside of an element, and between elements."""


@dataclasses.dataclass(frozen=True)
class JsonList:
    """Files with one list. It is one span, and read element by element."""

    compression: Compression | None = None

    @property
    def name(self) -> str:
        return f"JSON list, {self.compression.name}" if self.compression else "JSON list"

    def spans(self, file: Document, size: int) -> list[Span]:
        return [Span(0, file.size)]

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        number = 0
        try:
            with open_bytes(file.path, self.compression) as stream:
                for element in _elements(stream):
                    number += 1
                    place = Place(file.name, "record", number)
                    text = json_text(element.strip(), text_field)
                    yield Record(place, text) if type(text) is bytes else Bad(place, str(text))
        except (_NoEnd, Damaged) as error:
            reason = f"{error}; this record and those after it are lost"
            yield Bad(Place(file.name, "record", number + 1), reason)
        except OSError as error:
            raise UserError(
                f"{file.field}: cannot read {file.path!r}: {error.strerror or error}"
            ) from error


class _NoEnd(Exception):
    """A list in which the end of an element is lost; the message is the reason."""


def _elements(stream: io.BufferedReader) -> Iterator[bytes]:
    """The parts between the commas of the list, whether they are JSON or not."""
    splitter = _Splitter()
    for chunk in _chunks(stream):
        yield from splitter.split(chunk)
    if not splitter.is_over:
        raise _NoEnd("the list has no end, as in an incomplete copy or download")


def _chunks(stream: io.BufferedReader) -> Iterator[bytes]:
    """The bytes behind the bracket that opens the list."""
    rest = b""
    while not rest and (chunk := stream.read1(CHUNK)):
        rest = chunk.lstrip(BOM + b" \t\r\n")
    if rest[:1] != b"[":
        raise _NoEnd("the file does not begin with a list")
    yield rest[1:]
    while chunk := stream.read1(CHUNK):
        yield chunk


class _Splitter:
    """A list cut at the commas between its elements, chunk by chunk.

    Only quotation marks, brackets and commas are looked at, each once, so that time and memory are
    linear in the length of an element.
    """

    def __init__(self):
        self.is_over = False
        self._parts: list[bytes] = []  # of the current element, in earlier chunks
        self._size = 0
        self._is_first = True
        self._depth = 0
        self._in_string = self._is_escaped = False

    def split(self, chunk: bytes) -> Iterator[bytes]:
        """The elements that end in a chunk."""
        begin = at = 0
        while not self.is_over and (at := self._next(chunk, at)) >= 0:
            element = b"".join((*self._parts, chunk[begin:at]))
            self._parts, self._size = [], 0
            self.is_over = chunk[at : at + 1] == b"]"
            if not (self.is_over and self._is_first and not element.strip()):
                yield element
            self._is_first = False
            at += 1
            begin = at
        if not self.is_over:
            self._parts.append(chunk[begin:])
            self._size += len(chunk) - begin
            if self._size > LONGEST:
                raise _NoEnd(TOO_LONG)
        elif chunk[begin:].strip():
            raise _NoEnd("the file goes on after the end of the list")

    def _next(self, chunk: bytes, at: int) -> int:
        """The position of the next comma between elements, or of the end of the list; -1 if it is
        in a later chunk."""
        while True:
            if self._in_string:
                at += self._is_escaped
                quote = chunk.find(b'"', at)
                before = chunk[at : quote if quote >= 0 else len(chunk)]
                is_odd = (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
                self._is_escaped = is_odd and quote < 0
                if quote < 0:
                    return -1
                at, self._in_string = quote + 1, is_odd
                continue
            mark = (_INNER if self._depth else _OUTER).search(chunk, at)
            if mark is None:
                return -1
            at = mark.end()
            if mark[0] == b'"':
                self._in_string = True
            elif mark[0] in b"{[":
                self._depth += 1
            elif mark[0] == b"}" and not self._depth:
                raise _NoEnd("it has a } without a {")
            elif self._depth:
                self._depth -= 1
            else:
                return mark.start()
