"""Arrow IPC files and streams: the column `data.text_field`, a document per row.

Folders that Hugging Face ``datasets`` saves hold such streams.
"""

import contextlib
import dataclasses
import functools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

from moejax.data.documents import Document
from moejax.data.formats.columns import column_texts, first_line, text_column
from moejax.data.formats.format import Bad, Place, Record, Span, spans_of
from moejax.errors import UserError

FILE = b"ARROW1"
"""The first bytes of a file; a stream begins with a message."""
END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a stream."""


@dataclasses.dataclass(frozen=True)
class Arrow:
    """Files and streams of Arrow IPC, mapped into memory. Spans are record batches.

    A stream with dictionaries is one span: its batches need the dictionaries before them.
    """

    name: str = "Arrow"

    def spans(self, file: Document, size: int) -> list[Span]:
        import pyarrow

        sizes: list[int] = []
        try:
            with _mapped(file) as data:
                sizes.extend(_batch_sizes(data))
        except (_Damaged, OSError, ValueError, pyarrow.ArrowException):
            sizes.append(0)  # the damage, of which the reader of the last span says more
        return spans_of(sizes, size)

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        import pyarrow

        row = 0
        before = functools.partial(rows_before, file, span.begin) if span.begin else None
        place = lambda index: Place(file.name, "row", row + index + 1, before)
        try:
            with _mapped(file) as data:
                column = text_column(_schema(data), text_field, file)
                for load in _batches(data, span):
                    try:
                        batch = load()
                        yield from column_texts(batch.column(column), text_field, place)
                        row += batch.num_rows
                    except (OSError, ValueError, pyarrow.ArrowException) as error:
                        yield Bad(place(0), f"its record batch is damaged ({first_line(error)})")
        except (_Damaged, OSError, ValueError, pyarrow.ArrowException) as error:
            reason = f"the Arrow file is not complete ({first_line(error)})"
            yield Bad(place(0), f"{reason}; this row and those after it are lost")


class _Damaged(Exception):
    """A stream that ends early."""


@contextlib.contextmanager
def _mapped(file: Document) -> Iterator[Any]:
    """The bytes of a file as a buffer of pyarrow. Raises UserError if it cannot be opened."""
    import pyarrow

    try:
        with open(file.path, "rb") as source:
            data = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{file.field}: cannot read {file.path!r}: {error}") from error
    yield pyarrow.py_buffer(data)  # unmapped with the last array that refers to it


def _is_file(data: Any) -> bool:
    return data[: len(FILE)].to_pybytes() == FILE


def _schema(data: Any) -> Any:
    from pyarrow import ipc

    return ipc.open_file(data).schema if _is_file(data) else ipc.open_stream(data).schema


def _has_dictionaries(kind: Any) -> bool:
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _has_dictionaries(kind.storage_type)
    if pyarrow.types.is_dictionary(kind):
        return True
    return any(_has_dictionaries(kind.field(index).type) for index in range(kind.num_fields))


def _messages(data: Any) -> Iterator[Any]:
    """The record batches of a stream as messages, which are not decoded.

    Raises:
      _Damaged: the stream has no end.
    """
    import pyarrow
    from pyarrow import ipc

    source = pyarrow.BufferReader(data)
    reader = ipc.MessageReader.open_stream(source)
    for message in reader:
        if message.type == "record batch":
            yield message
    at = source.tell()
    if data[at - len(END) : at].to_pybytes() != END:
        raise _Damaged("the stream has no end")
    if at < data.size:
        raise _Damaged("there is something behind its end")


def _batch_sizes(data: Any) -> Iterator[int]:
    """Bytes of each record batch."""
    from pyarrow import ipc

    if _is_file(data):
        count = ipc.open_file(data).num_record_batches
        yield from [data.size // max(count, 1)] * count
    elif any(map(_has_dictionaries, _schema(data).types)):
        yield data.size
    else:
        for message in _messages(data):
            yield message.body.size if message.body else 0


def _batches(data: Any, span: Span) -> Iterator[Callable[[], Any]]:
    """The record batches of a span, as functions that read one."""
    from pyarrow import ipc

    if _is_file(data):
        reader = ipc.open_file(data)
        for index in range(span.begin, min(span.end, reader.num_record_batches)):
            yield functools.partial(reader.get_batch, index)
        return
    schema = _schema(data)
    if any(map(_has_dictionaries, schema.types)):
        for batch in ipc.open_stream(data):
            yield functools.partial(_same, batch)
        for _ in _messages(data):
            pass  # to the end, which may be missing
        return
    for index, message in enumerate(_messages(data)):
        if index >= span.begin:
            yield functools.partial(ipc.read_record_batch, message, schema)
        if index + 1 == span.end:  # what follows, and its damage, belongs to the next span
            return


def _same(batch: Any) -> Any:
    return batch


def rows_before(file: Document, batch: int) -> int:
    """The number of rows in the first record batches of a file, without damaged ones."""
    import pyarrow

    rows = 0
    with _mapped(file) as data:
        for load in _batches(data, Span(0, batch)):
            with contextlib.suppress(OSError, ValueError, pyarrow.ArrowException):
                rows += load().num_rows
    return rows
