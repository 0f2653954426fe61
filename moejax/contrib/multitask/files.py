"""Tables from a user's files: CSV, Parquet, or a folder of MovieLens."""

import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.contrib.multitask.columns import (
    EXACT,
    Column,
    Spec,
    numbers,
    order_by_time,
    parse_spec,
    table_of,
)
from moejax.contrib.multitask.tables import Table, heldout_count
from moejax.data.containers import kind_of_bytes
from moejax.data.split import check_fraction
from moejax.errors import UserError, suggest

SPLITS: tuple[str, ...] = ("hash", "time")
_SALT = np.uint64(0x6D6F656A61780003)
"""Decides which rows are held out; any fixed value would do."""

LARGEST_BLOCK = 2**31 - 1
"""Most bytes in one block of pyarrow."""
_LARGE = r"^\s*[+-]?\d{17,}(\.0*)?\s*$"
"""Pattern of whole numbers that are certainly beyond 2**53."""
_CODED = r"^\s*([+-]?0\d+(\.\d*)?|0[xX][0-9a-fA-F]+|\d+[eE]\d+)\s*$"
"""Pattern of numbers in spellings unusual for quantities: 007, 041.9, 0x1f, 12E4."""


class Choice(NamedTuple):
    """The use of each column, by its name in the file; an empty use is detected."""

    targets: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    time: str = ""


def load_table(
    path: str,
    *,
    targets: Sequence[str] = (),
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    split: str = "hash",
    time: str = "",
    eval_fraction: float = 0.1,
    min_count: int = 2,
) -> Table:
    """Read a table and split it. Rows are numbered from 1, without the header.

    Args:
      path: a .csv, .tsv or .parquet file with a header; or a folder with MovieLens' ratings.csv
        (userId, movieId, rating, timestamp) and movies.csv (movieId, title, genres).
      targets: columns to predict, each ``column``, ``name=column`` or ``name=column>=number``. The
        last form is binary, and so is a column that holds only 0 and 1 (or true and false); all
        others are regressions. Missing values are allowed. MovieLens: rating and liked=rating>=4.
      categorical, numeric: features. If neither is given, all other columns: text and booleans are
        categorical, numbers and times numeric; numbers that look like identifiers, beyond 2**53 or
        with leading zeros, are refused until they are named. Categories are exact values: in CSV
        the text as written. MovieLens: userId, movieId and the hour (UTC) are categorical,
        "genre=..." of each genre (0 or 1) numeric.
      split: "hash" holds out the rows whose numbers have the smallest hashes: pseudo-random, the
        same in every run. "time" holds out the latest rows by the column ``time`` (MovieLens:
        timestamp), which is then not a feature.
      eval_fraction: share of the rows to hold out, in (0, 1).
      min_count: values of a categorical column that occur in fewer training rows share id 0,
        "unknown", with missing values and those of held-out rows alone. At 1 nothing trains id 0.

    Vocabularies, and the mean and spread that standardise numeric columns, are computed on the
    training rows. Missing numbers become the mean.

    Raises:
      UserError: in one line: a file that is missing, empty, not UTF-8 or cannot be parsed; a column
        that is unknown or named twice; an invalid number, with its row; a target that is constant,
        or a feature too.
    """
    check_fraction(eval_fraction)
    if split not in SPLITS:
        raise UserError(f"task.split: {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if min_count < 1:
        raise UserError(f"task.min_count: {min_count} must be at least 1")
    asked = Choice(tuple(targets), tuple(categorical), tuple(numeric), time)
    columns, known = _read(os.path.expanduser(path), path, asked)
    choice, specs = _choose(columns, asked, known)
    rows = len(next(iter(columns.values())).array)
    if rows < 2:
        raise UserError(
            f"data.path: {path!r} has {rows} rows; at least 2 are needed to hold one out"
        )
    if split == "time":
        if not choice.time:
            raise UserError("task.time: task.split=time needs the column to sort by")
        order = order_by_time(columns[choice.time])
    else:
        order = np.argsort(_hash(rows), kind="stable")[::-1]
    heldout_N = np.zeros(rows, dtype=bool)
    heldout_N[order[rows - heldout_count(rows, eval_fraction) :]] = True
    return table_of(
        specs,
        [columns[name] for name in choice.categorical],
        [columns[name] for name in choice.numeric],
        heldout_N,
        min_count,
        os.path.basename(os.path.normpath(path)),
    )


def _choose(
    columns: dict[str, Column], asked: Choice, known: Choice
) -> tuple[Choice, list[tuple[Spec, Column]]]:
    """The use of each column, with all names checked."""
    targets = asked.targets or known.targets
    if not targets:
        raise UserError(f"task.targets: name columns to predict; {suggest('', columns)}")
    time = asked.time or known.time
    specs = [parse_spec(text, columns) for text in targets]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"task.targets: two targets have one name ({', '.join(names)}); use name=")
    categorical, numeric = asked.categorical, asked.numeric
    if not (categorical or numeric):
        categorical, numeric = known.categorical, known.numeric
    if not (categorical or numeric):
        taken = {spec.column for spec in specs} | {time}
        free = [column for name, column in columns.items() if name not in taken]
        categorical = tuple(column.name for column in free if column.is_category)
        numeric = tuple(column.name for column in free if not column.is_category)
        _check_no_codes([columns[name] for name in numeric])
    asked_for = (
        ("targets", [spec.column for spec in specs]),
        ("categorical", categorical),
        ("numeric", numeric),
        ("time", [time] if time else []),
    )
    for field, some in asked_for:
        for name in some:
            if name not in columns:
                raise UserError(f"task.{field}: no column {name!r}; {suggest(name, columns)}")
    for name in (*categorical, *numeric):
        if name in [spec.column for spec in specs]:
            raise UserError(f"task.targets: {name!r} is a feature too, which would give it away")
    _check_features(categorical, numeric)
    if not (categorical or numeric):
        besides = f"the targets and {time!r} (task.time)" if time else "the targets"
        raise UserError(f"task.categorical: the file has no columns besides {besides}")
    choice = Choice(tuple(targets), tuple(categorical), tuple(numeric), time)
    return choice, [(spec, columns[spec.column]) for spec in specs]


def _check_no_codes(columns: Sequence[Column]) -> None:
    """Raise UserError for numbers that look like identifiers and are not named as numbers."""
    for column in columns:
        if column.code:
            raise UserError(
                f"task.categorical: {column.name!r} has numbers that look like identifiers, such "
                f"as {column.code}; name all features in task.categorical (where values stay "
                "exact) and task.numeric"
            )


def _check_features(categorical: Sequence[str], numeric: Sequence[str]) -> None:
    """Raise UserError for a feature that is named twice."""
    for field, some in (("categorical", categorical), ("numeric", numeric)):
        for name in some:
            if list(some).count(name) > 1:
                raise UserError(f"task.{field}: {name!r} is named twice; name it once")
    for name in categorical:
        if name in numeric:
            raise UserError(
                f"task.numeric: {name!r} is in task.categorical too; leave it out of one of them"
            )


def _hash(rows: int) -> np.ndarray:
    """A pseudo-random number for each row number (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, rows + 1, dtype=np.uint64) + _SALT) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _read(path: str, given: str, asked: Choice) -> tuple[dict[str, Column], Choice]:
    """The columns, and the uses that the file format implies."""
    try:
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, "ratings.csv")):
                raise UserError(
                    f"data.path: {given!r} is a folder without ratings.csv; name a .csv, .tsv or "
                    ".parquet file, or a folder of MovieLens"
                )
            return _movielens(path, asked)
        if not os.path.exists(path):
            raise UserError(f"data.path: {given!r} does not exist")
        return _columns(path, asked), Choice()
    except OSError as error:
        raise UserError(f"data.path: cannot read {given!r}: {error.strerror or error}") from error


def _columns(path: str, asked: Choice) -> dict[str, Column]:
    """The columns of a file by name; those named as categories keep their text."""
    import pyarrow  # slow to import
    from pyarrow import parquet

    if os.path.getsize(path) == 0:
        raise UserError(f"data.path: {path!r} is empty")
    with open(path, "rb") as file:
        is_csv = file.read(4) != b"PAR1" and not path.lower().endswith((".parquet", ".pq"))
    try:
        table = _read_csv(path, asked.categorical) if is_csv else parquet.read_table(path)
        names = table.column_names
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"data.path: the file has two columns called {name!r}")
        columns = {name: Column.of(name, table.column(name)) for name in names}
        return columns | (_codes(path, columns, asked) if is_csv else _rounded(columns))
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: the header of {path!r} is not UTF-8; save the file as UTF-8"
        ) from error
    except pyarrow.ArrowException as error:
        raise UserError(f"data.path: cannot parse {path!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    reason = str(error).splitlines()[0]
    if "invalid UTF8" in reason:
        return f"{reason}; save the file as UTF-8"
    if "conversion error" in reason:  # in a row after those that pyarrow infers the type from
        return f"{reason}; name the column in task.categorical to have it as text"
    return reason


def _read_csv(path: str, as_text: Sequence[str], only: Sequence[str] = ()) -> Any:
    """The file as a table of pyarrow; columns ``as_text`` are not parsed as numbers.

    Read in one block, up to pyarrow's largest: the type of a column then depends on all its values,
    and a quoted value may have line breaks and any length.
    """
    import pyarrow
    from pyarrow import csv

    with pyarrow.input_stream(path, compression="detect") as file:
        text = file.read()
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"data.path: {path!r} is UTF-16; save the file as UTF-8")
    kind = kind_of_bytes(io.BytesIO(text))
    if kind:
        raise UserError(
            f"data.path: {path!r} looks like {kind.name}, which is not a table; name a .csv, "
            ".tsv or .parquet file"
        )
    table = csv.read_csv(
        pyarrow.BufferReader(text),
        read_options=csv.ReadOptions(block_size=min(len(text) + 1, LARGEST_BLOCK)),
        parse_options=csv.ParseOptions(
            delimiter="\t" if ".tsv" in _suffixes(path) else ",", newlines_in_values=True
        ),
        convert_options=csv.ConvertOptions(
            column_types={name: pyarrow.large_string() for name in as_text},
            include_columns=list(only),
        ),
    )
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if str(kind) == "binary":  # pyarrow's type of text that is not UTF-8
            raise UserError(
                f"data.path: column {name!r} of {path!r} is not UTF-8; save the file as UTF-8"
            )
    return table


def _suffixes(path: str) -> list[str]:
    """All suffixes of the file name: ``.tsv`` and ``.gz`` of ``sales.tsv.gz``."""
    return pathlib.PurePath(path.lower()).suffixes


def _rounded(columns: dict[str, Column]) -> dict[str, Column]:
    """The columns of floats that look like identifiers, with an example: pandas writes whole
    numbers as floats if one is missing."""
    from pyarrow import types

    codes = {name: column.rounded_id for name, column in columns.items()}
    return {
        name: columns[name]._replace(code=code)
        for name, code in codes.items()
        if code and types.is_float64(columns[name].array.type)
    }


def _codes(path: str, columns: dict[str, Column], asked: Choice) -> dict[str, Column]:
    """The numeric columns of a CSV whose text looks like identifiers, with an example.

    The parsed numbers do not show it: leading zeros are lost, and whole numbers beyond 2**64 are
    floats. Such spellings matter only if neither categories nor numbers are named.
    """
    from pyarrow import compute, types

    named = bool(asked.categorical or asked.numeric)
    suspect = [
        name
        for name, column in columns.items()
        if (types.is_integer(column.array.type) and not named)
        or (types.is_floating(column.array.type) and (not named or _reaches(column, EXACT)))
    ]
    if not suspect:
        return {}
    text, marked = _read_csv(path, suspect, only=suspect), {}
    for name in suspect:
        matches = compute.match_substring_regex(  # pyright: ignore[reportAttributeAccessIssue]
            text.column(name), _LARGE if named else f"{_LARGE}|{_CODED}"
        )
        examples = text.column(name).filter(matches)
        if len(examples):
            marked[name] = columns[name]._replace(code=examples[0].as_py().strip())
    return marked


def _reaches(column: Column, bound: int) -> bool:
    """True if a column of floats has an absolute value of at least ``bound``."""
    values = column.array.to_numpy(zero_copy_only=False)
    return bool((np.abs(values) >= bound).any())  # False for NaN


def _movielens(folder: str, asked: Choice) -> tuple[dict[str, Column], Choice]:
    """Ratings with the genres of their movies and the hour of the day."""
    ids = ("userId", "movieId")
    read_as = asked._replace(categorical=(*asked.categorical, *ids))
    ratings = _columns(os.path.join(folder, "ratings.csv"), read_as)
    for name in (*ids, "rating"):
        if name not in ratings:
            raise UserError(
                f"data.path: ratings.csv has no column {name!r}; {suggest(name, ratings)}"
            )
    features, time = [*ids], ""
    if "timestamp" in ratings:
        time = "timestamp"
        hour_N = numbers(ratings[time], "time") // 3600 % 24
        ratings["hour"] = _column("hour", hour_N)
        features.append("hour")
    genres: list[Column] = []
    if os.path.exists(os.path.join(folder, "movies.csv")):
        movies = _columns(os.path.join(folder, "movies.csv"), Choice(categorical=("movieId",)))
        genres = _genres(movies, ratings["movieId"])
    ratings |= {column.name: column for column in genres}
    known = Choice(
        ("rating", "liked=rating>=4"), tuple(features), tuple(c.name for c in genres), time
    )
    return ratings, known


def _column(name: str, values: np.ndarray) -> Column:
    """A column of numbers, NaN where missing."""
    import pyarrow

    return Column.of(name, pyarrow.array(values, from_pandas=True))


def _genres(movies: dict[str, Column], rated: Column) -> list[Column]:
    """A column per genre: 1 if the movie of the rating has it, otherwise 0; 0 for unlisted movies.

    Raises:
      UserError: a column is missing, or no rated movie is listed, so that the ids do not match.
    """
    for name in ("movieId", "genres"):
        if name not in movies:
            raise UserError(
                f"data.path: movies.csv has no column {name!r}; {suggest(name, movies)}"
            )
    lists = [str(text or "").split("|") for text in movies["genres"].array.to_pylist()]
    names = sorted({genre for some in lists for genre in some} - {"", "(no genres listed)"})
    index = {movie: i for i, movie in enumerate(movies["movieId"].array.to_pylist())}
    encoded = rated.array.dictionary_encode()
    each = [*encoded.dictionary.to_pylist(), None]
    of_N = encoded.indices.fill_null(len(each) - 1).to_numpy(zero_copy_only=False)
    row_V = np.array([index.get(movie, len(lists)) for movie in each])
    if names and (row_V == len(lists)).all():
        raise UserError(
            f"data.path: movies.csv lists no movie of ratings.csv ({each[0]!r} is none of "
            f"{next(iter(index))!r} and so on); ids must be written alike in both"
        )
    columns = []
    for genre in names:
        has = np.array([genre in some for some in lists] + [False], dtype=np.float64)
        columns.append(_column(f"genre={genre}", has[row_V[of_N]]))
    return columns
