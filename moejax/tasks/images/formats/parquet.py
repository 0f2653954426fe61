"""Parquet with a picture in every row, as Hugging Face ``datasets`` writes it."""

import json
from collections.abc import Iterator
from typing import Any

from moejax.errors import UserError
from moejax.tasks.images.formats.files import shards_of, side_of
from moejax.tasks.images.formats.format import Labels, Picture, damaged, reading

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Columns in the order of preference; otherwise the only one that ``datasets`` declares as such."""
ROWS = 64
"""Rows read at once."""
BUFFER = 1 << 20
"""Bytes of a column read ahead."""
WHAT = "a Parquet file"


class Parquet:
    """A column of encoded pictures, ``struct{bytes, path}`` or binary, and one of labels.

    Labels are numbers or words. If the schema has ``datasets``' description of its columns, its
    ClassLabel names the classes.
    """

    name = "Parquet"

    def owns(self, path: str) -> bool:
        return path.lower().endswith((".parquet", ".pq"))

    def side(self, name: str) -> str:
        return side_of(name)

    def companions(self, name: str) -> tuple[str, ...]:
        return shards_of(name)

    def labels(self, path: str) -> Labels:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with reading(path, WHAT, *_errors()), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = _features(path, schema)
            column = _column(path, schema, features, LABEL_COLUMNS, "ClassLabel", "labels")
            _image_column(path, schema, features)  # so that a missing one is reported early
            values = file.read(columns=[column])[column]
            labels: list[Any] = values.to_pylist()
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if not (pa.types.is_integer(kind) or kind in (pa.string(), pa.large_string())):
            raise UserError(
                f"data.path: column {column!r} of {path!r} has labels of type {values.type}; write "
                "one number or word per picture"
            )
        if None in labels:
            raise UserError(
                f"data.path: {path}:{labels.index(None) + 1} has no label (column {column!r}); "
                "leave the row out, or give it one"
            )
        return Labels(labels, tuple(features.get(column, {}).get("names") or ()))

    def pictures(self, path: str) -> Iterator[Picture]:
        import pyarrow.parquet as pq

        row = 0
        with (
            reading(path, WHAT, *_errors()),
            pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file,  # page by page
        ):
            column = _image_column(path, file.schema_arrow, _features(path, file.schema_arrow))
            for batch in file.iter_batches(ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if data is None:
                        raise UserError(
                            f"data.path: {path}:{row} has no bytes of a picture in column "
                            f"{column!r}; write the pictures themselves, not their paths"
                        )
                    yield Picture(f"{path}:{row}", data)


def _errors() -> tuple[type[Exception], ...]:
    """Exceptions that damage in a file can raise."""
    import pyarrow as pa

    return (pa.ArrowException, UnicodeDecodeError)


def _features(path: str, schema: Any) -> dict[str, Any]:
    """The columns as ``datasets`` describes them in the schema's metadata; empty without it."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        declared = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
        for kind in declared.values():
            if not all(isinstance(name, str) for name in kind.get("names") or ()):
                raise TypeError("names of classes that are no words")
        return declared
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, WHAT, f"metadata 'huggingface': {error!r}") from error


def _column(
    path: str, schema: Any, features: dict, names: tuple[str, ...], kind: str, what: str
) -> str:
    """The column called one of ``names``, or the only one that is declared to be a ``kind``."""
    for name in names:
        if name in schema.names:
            return name
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    if len(declared) == 1:
        return declared[0]
    raise UserError(
        f"data.path: {path!r} has no column of {what} ({', '.join(names)}), only "
        f"{', '.join(map(repr, schema.names)) or 'none'}; rename one"
    )


def _image_column(path: str, schema: Any, features: dict) -> str:
    """The column of pictures, with a type that can hold their bytes."""
    import pyarrow as pa

    name = _column(path, schema, features, IMAGE_COLUMNS, "Image", "pictures")
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if kind not in (pa.binary(), pa.large_binary()):
        raise UserError(
            f"data.path: column {name!r} of {path!r} has type {schema.field(name).type}, not the "
            "bytes of pictures; write it with datasets' Image feature, or as binary"
        )
    return name
