"""The formats that are read, and the choice among them by what a file holds."""

from collections.abc import Callable, Sequence

from moejax.data import containers
from moejax.data.containers import Contents, Kind, contents_of_all
from moejax.data.formats.array_record import ArrayRecord
from moejax.data.formats.arrow import Arrow
from moejax.data.formats.compression import Compression
from moejax.data.formats.format import Format
from moejax.data.formats.json_lines import JsonLines
from moejax.data.formats.json_list import JsonList
from moejax.data.formats.parquet import Parquet
from moejax.data.formats.plain import CompressedText

FORMATS: dict[Kind, Callable[[Compression | None], Format]] = {
    containers.JSON_LINES: JsonLines,
    containers.JSON_LIST: JsonList,
    containers.PARQUET: lambda compression: Parquet(),
    containers.ARROW: lambda compression: Arrow(),
    containers.ARRAY_RECORD: lambda compression: ArrayRecord(),
}
"""The reader of each kind of file. A file without a kind is plain text."""


def format_of(path: str, field: str = "data.path") -> Format | None:
    """The format of a file by its name and first bytes; None: plain text, not compressed.

    Raises:
      UserError: the file is neither text nor in a format that is read, or its name says something
        else than its bytes; ``field`` is the config field to name.
    """
    return formats_of([path], field)[0]


def formats_of(paths: Sequence[str], field: str = "data.path") -> list[Format | None]:
    """The formats of files, in their order. The error for a folder has the number of such files."""
    return [_format(contents) for contents in contents_of_all(paths, field)]


def _format(contents: Contents) -> Format | None:
    if contents.kind is not None:
        return FORMATS[contents.kind](contents.compression)
    return CompressedText(contents.compression) if contents.compression else None
