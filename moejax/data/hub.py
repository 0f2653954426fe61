"""Data sets of the library `datasets`, read while they are trained on: ``hf://NAME``.

The path is ``hf://NAME?config=C&split=S&revision=R``, all after the name optional; the split is
``train`` unless another is named. ``hf:///abs/folder`` is a folder that the library can load, such
as one of Parquet or JSON lines. Units are the library's own shards (``IterableDataset.shard``), and
a place in a shard is found with its ``skip``. Nothing is downloaded that is not read.
"""

import urllib.parse
from collections.abc import Iterator
from typing import Any

from moejax.data.formats.format import Bad, Record
from moejax.errors import UserError

PREFIX = "hf://"
OPTIONS = ("config", "split", "revision")
FETCHED = 256
"""Records that are converted at a time."""


def is_hub(path: str) -> bool:
    """True for a path that names a data set of the library."""
    return path.startswith(PREFIX)


class HubUnits:
    """The documents of a split: see `moejax.data.stream.units.Units`.

    Raises:
      UserError: the library is not installed, it cannot load the data set, or there is no such
        column.
    """

    size = 0
    formats = ("a data set of the library `datasets`",)

    def __init__(self, path: str, text_field: str, field: str) -> None:
        self.field, self._path, self._text_field = field, path, text_field
        name, self._options = _parsed(path, field)
        split = self._options.get("split", "train")
        self.name = f"{name} ({', '.join([split, *_given(self._options, 'config')])})"
        self._data = self._loaded(name, split)
        columns = self._data.column_names
        if columns is not None and text_field not in columns:
            raise self._no_column(columns)

    def _loaded(self, name: str, split: str) -> Any:
        library = _library(f"{self.field}={self._path!r}")
        options = self._options
        try:
            return library.load_dataset(
                name,
                options.get("config"),
                split=split,
                revision=options.get("revision"),
                streaming=True,
            )
        except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
            raise UserError(
                f"{self.field}={self._path!r}: datasets cannot load it: {_line(error)}"
            ) from error

    def __len__(self) -> int:
        return self._data.num_shards

    def read(self, unit: int, record: int = 0) -> Iterator[Record | Bad]:
        library = _library(self.field)
        shard = self._data.shard(num_shards=len(self), index=unit)
        rows = shard.skip(record).iter(FETCHED) if record else shard.iter(FETCHED)
        number = record
        while True:
            try:
                batch = next(rows, None)
            except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
                raise UserError(
                    f"{self.field}={self._path!r}: datasets cannot read it: {_line(error)}; the "
                    "same command resumes"
                ) from error
            if batch is None:
                return
            if self._text_field not in batch:
                raise self._no_column(list(batch))
            for text in batch[self._text_field]:
                number += 1
                yield _record(f"{self.name}, shard {unit}, record {number}", text)

    def identity(self) -> Any:
        return [self._text_field, self.name, self._options, len(self)]

    def _no_column(self, columns: list[str]) -> UserError:
        return UserError(
            f"data.text_field={self._text_field!r}: {self._path!r} has no such column; its columns "
            f"are {', '.join(map(repr, columns))}"
        )


def _record(place: str, text: object) -> Record | Bad:
    if not isinstance(text, str):
        return Bad(place, f"has {'null' if text is None else type(text).__name__} for a text")
    try:
        return Record(place, text.encode())
    except UnicodeEncodeError:
        return Bad(place, "has half of a surrogate pair, which is not a character")


def _parsed(path: str, field: str) -> tuple[str, dict[str, str]]:
    name, _, query = path.removeprefix(PREFIX).partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for option, value in options.items():
        if option not in OPTIONS or not value:
            raise UserError(
                f"{field}={path!r}: {option}={value} is no option; use {PREFIX}NAME with "
                f"{', '.join(f'{x}=..' for x in OPTIONS)} after a question mark, joined by &"
            )
    if not name:
        raise UserError(f"{field}={path!r} names no data set; use {PREFIX}NAME")
    return name, options


def _given(options: dict[str, str], name: str) -> list[str]:
    return [options[name]] if name in options else []


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _library(asked: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{asked} needs datasets; pip install 'moejax[hf]'") from error
    return datasets
