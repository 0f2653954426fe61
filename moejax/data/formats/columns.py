"""The text column of Arrow tables, which Parquet files become too."""

from collections.abc import Callable, Iterator
from typing import Any

from moejax.data.documents import Document
from moejax.data.formats.format import Bad, Place, Record
from moejax.data.formats.records import names_in_words, utf8_text
from moejax.errors import UserError


def text_column(schema: Any, field: str, file: Document) -> int:
    """The number of the column with the text.

    Raises:
      UserError: there is no such column, or several, or it has no text.
    """
    import pyarrow

    found = schema.get_all_field_indices(field)
    if len(found) != 1:
        problem = "has no such column" if not found else f"has {len(found)} such columns"
        raise UserError(
            f"data.text_field={field!r}: {file.path!r} {problem}; "
            f"{names_in_words(schema.names, field, 'column')}"
        )
    kind = schema.field(found[0]).type
    if not _is_text(kind) and not pyarrow.types.is_null(kind):
        texts = [
            name for name, kind in zip(schema.names, schema.types, strict=True) if _is_text(kind)
        ]
        remedy = f"name one of {', '.join(map(repr, texts[:8]))}" if texts else "it has no text"
        raise UserError(
            f"data.text_field={field!r}: the column of {file.path!r} holds {kind}, not text; "
            f"{remedy}"
        )
    return found[0]


def _storage(kind: Any) -> Any:
    """The type of the values, without extension (such as arrow.json) and dictionary."""
    import pyarrow

    while True:
        if isinstance(kind, pyarrow.BaseExtensionType):
            kind = kind.storage_type
        elif pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _is_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    kind = _storage(kind)
    return any(
        check(kind)
        for check in (
            types.is_string, types.is_large_string, types.is_string_view,
            types.is_binary, types.is_large_binary, types.is_binary_view,
        )
    )  # fmt: skip


def column_texts(column: Any, field: str, place: Callable[[int], Place]) -> Iterator[Record | Bad]:
    """The texts of an array of a text column, in order; ``place`` of each index.

    Raises:
      pyarrow.ArrowInvalid: the array is damaged.
    """
    for index, value in enumerate(_binary(column).to_pylist()):
        if value is None:
            yield Bad(place(index), f"its field {field!r} is null, not text")
            continue
        text = utf8_text(value)
        yield Record(place(index), text) if type(text) is bytes else Bad(place(index), str(text))


def _binary(column: Any) -> Any:
    """The array as bytes, whose buffers are certainly in order: reading others may crash."""
    import pyarrow

    if isinstance(column.type, pyarrow.BaseExtensionType):
        return _binary(column.storage)
    if pyarrow.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        values = _binary(column.dictionary)
        pyarrow.DictionaryArray.from_arrays(column.indices, values).validate(full=True)
        return values.take(column.indices)
    if pyarrow.types.is_null(column.type):
        return column
    kind = column.type
    if pyarrow.types.is_string(kind):
        column = column.view(pyarrow.binary())
    elif pyarrow.types.is_large_string(kind):
        column = column.view(pyarrow.large_binary())
    elif pyarrow.types.is_string_view(kind):
        column = column.cast(pyarrow.binary_view())
    column.validate(full=True)
    return column


def first_line(error: Exception) -> str:
    """The first line of an error of pyarrow, which may have several."""
    return str(error).partition("\n")[0].rstrip(".")
