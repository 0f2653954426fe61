"""Parquet: the column `data.text_field`, a document per row."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from moejax.data.documents import Document
from moejax.data.formats.columns import column_texts, first_line, text_column
from moejax.data.formats.format import Bad, Place, Record, Span, spans_of
from moejax.errors import UserError

BATCH = 4 << 20
"""About so many bytes of text are decoded at once."""
MOST_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Parquet:
    """Files of Apache Parquet. Spans are row groups; only the column with the text is read."""

    name: str = "Parquet"

    def spans(self, file: Document, size: int) -> list[Span]:
        try:
            with _open(file) as parquet:
                meta = parquet.metadata
                # Sizes of single columns may end the process if the file is damaged.
                bytes_G = [
                    max(meta.row_group(group).total_byte_size, 0)
                    for group in range(meta.num_row_groups)
                ]
        except _Unreadable:
            return [Span(0, 1)]  # its reader says why
        return spans_of(bytes_G, size)

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        try:
            with _open(file) as parquet:
                text_column(parquet.schema_arrow, text_field, file)
                row = 0
                before = functools.partial(rows_before, file.path, span.begin)
                for group in range(span.begin, min(span.end, parquet.num_row_groups)):
                    rows = parquet.metadata.row_group(group).num_rows
                    yield from _group(parquet, group, file, text_field, row, before)
                    row += rows
        except _Unreadable as error:
            yield Bad(file.name, str(error))


def _group(
    parquet: Any, group: int, file: Document, field: str, row: int, before: Any
) -> Iterator[Record | Bad]:
    """The documents of one row group, which follows ``row`` rows of its span."""
    import pyarrow

    given = 0
    place = lambda index: Place(file.name, "row", row + given + index + 1, before)
    try:
        for batch in parquet.iter_batches(
            batch_size=_batch_rows(parquet.metadata.row_group(group)),
            row_groups=[group],
            columns=[field],
            use_threads=False,
        ):
            column = batch.column(batch.schema.names.index(field))
            yield from column_texts(column, field, place)
            given += len(column)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = f"row group {group + 1} cannot be read ({first_line(error)}); its rows from here "
        yield Bad(place(0), f"{reason}on are lost")


def _batch_rows(group: Any) -> int:
    return max(1, min(MOST_ROWS, BATCH * group.num_rows // max(group.total_byte_size, 1)))


class _Unreadable(Exception):
    """A file that is not Parquet, or is incomplete."""


@contextlib.contextmanager
def _open(file: Document) -> Iterator[Any]:
    """The open Parquet file.

    Raises:
      UserError: the file cannot be opened.
      _Unreadable: it has no readable description of its contents.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        source = open(file.path, "rb")
    except OSError as error:
        raise UserError(f"{file.field}: cannot read {file.path!r}: {error.strerror}") from error
    with source:
        try:
            opened = parquet.ParquetFile(
                source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            )
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise _Unreadable(
                f"it is not a complete Parquet file ({first_line(error)}), as after an incomplete "
                "copy or download"
            ) from error
        with opened:
            yield opened


def rows_before(path: str, group: int) -> int:
    """The number of rows in the first row groups of a file."""
    from pyarrow import parquet

    meta = parquet.read_metadata(path)
    return sum(meta.row_group(index).num_rows for index in range(group))
