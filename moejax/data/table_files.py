"""Tables from a user's files: CSV, Parquet, or a folder of MovieLens."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.data.table_columns import Column, Spec, parse_spec, table_of, timestamp
from moejax.data.tables import Table, check_fraction, heldout_count
from moejax.errors import UserError, suggest

SPLITS: tuple[str, ...] = ("hash", "time")
_SALT = np.uint64(0x6D6F656A61780003)
"""Any fixed value would do: it decides which rows are held out."""


class Choice(NamedTuple):
    """Which columns are what. Names are those of the file; empty ones are for detection."""

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
    """Reads a table and splits it. Rows are numbered from 1, the header not counted.

    Args:
      path: a .csv, .tsv or .parquet file with a header; or a folder with MovieLens' ratings.csv
        (userId, movieId, rating, timestamp) and movies.csv (movieId, title, genres).
      targets: columns to predict, each ``column``, ``name=column`` or ``name=column>=number``. The
        last is binary, as is a column of nothing but 0 and 1 (or true and false); every other is a
        regression. Missing values are allowed. MovieLens: rating and liked=rating>=4.
      categorical, numeric: features. When neither is given, all other columns: text and booleans
        are categorical, numbers numeric (so name number codes yourself). MovieLens: userId, movieId
        and the hour (UTC) are categorical, "genre=..." of each genre (0 or 1) numeric.
      split: "hash" holds out the rows whose number has the smallest hashes: as good as at random,
        and the same for every run. "time" holds out the latest rows by the column ``time``
        (MovieLens: timestamp), which is then no feature.
      eval_fraction: share of the rows to hold out, in (0, 1).
      min_count: values of a categorical column that fewer training rows have share id 0, "unknown",
        with missing values and those that only held-out rows have. At 1 nothing trains it.

    Vocabularies, and the mean and spread that numeric columns are standardised with, are those of
    the training rows. Missing numbers become the mean.

    Raises:
      UserError: in one line: a file that is missing, empty, not UTF-8 or cannot be parsed; a column
        that is unknown or named twice; a number that is none, with its row; a target that is
        constant, or a feature too.
    """
    check_fraction(eval_fraction)
    if split not in SPLITS:
        raise UserError(f"task.split: {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if min_count < 1:
        raise UserError(f"task.min_count: {min_count} must be at least 1")
    columns, known = _read(os.path.expanduser(path), path)
    asked = Choice(tuple(targets), tuple(categorical), tuple(numeric), time)
    choice, specs = _choose(columns, asked, known)
    rows = len(next(iter(columns.values())).values)
    if rows < 2:
        raise UserError(
            f"data.path: {path!r} has {rows} rows; at least 2 are needed to hold one out"
        )
    if split == "time":
        if not choice.time:
            raise UserError("task.time: task.split=time needs the column to sort by")
        order = np.argsort(timestamp(columns[choice.time]), kind="stable")
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
    """What each column is for, all names checked."""
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
        categorical = tuple(column.name for column in free if column.is_text)
        numeric = tuple(column.name for column in free if not column.is_text)
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


def _check_features(categorical: Sequence[str], numeric: Sequence[str]) -> None:
    """Raises UserError for a feature that is named twice: it would be there twice."""
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


def _read(path: str, given: str) -> tuple[dict[str, Column], Choice]:
    """The columns, and what is known about them."""
    try:
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, "ratings.csv")):
                raise UserError(
                    f"data.path: {given!r} is a folder without ratings.csv; name a .csv, .tsv or "
                    ".parquet file, or a folder of MovieLens"
                )
            return _movielens(path)
        if not os.path.exists(path):
            raise UserError(f"data.path: {given!r} does not exist")
        return _columns(_arrow(path)), Choice()
    except OSError as error:
        raise UserError(f"data.path: cannot read {given!r}: {error.strerror or error}") from error


def _arrow(path: str) -> Any:
    """The file as a table of pyarrow."""
    try:
        import pyarrow
        from pyarrow import csv, parquet
    except ImportError as error:
        raise UserError(
            "data.path: reading tables needs pyarrow; pip install 'moejax[tables]'"
        ) from error
    if os.path.getsize(path) == 0:
        raise UserError(f"data.path: {path!r} is empty")
    try:
        if path.endswith((".parquet", ".pq")):
            return parquet.read_table(path)
        parse = csv.ParseOptions(delimiter="\t" if path.endswith(".tsv") else ",")
        try:
            return _utf8(csv.read_csv(path, parse_options=parse), path)
        except pyarrow.ArrowInvalid as error:
            if "conversion error" not in str(error):
                raise
        # A column that began as numbers has something else further down: then all are text, and
        # whoever needs a number says in which row there is none.
        with csv.open_csv(path, parse_options=parse) as reader:
            types = {name: pyarrow.string() for name in reader.schema.names}
        text = csv.ConvertOptions(column_types=types)
        return csv.read_csv(path, parse_options=parse, convert_options=text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: the header of {path!r} is not UTF-8; save the file as UTF-8"
        ) from error
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data.path: cannot parse {path!r}: {reason}") from error


def _utf8(table: Any, path: str) -> Any:
    """The table of a CSV, in which pyarrow gives text that is not UTF-8 the type binary."""
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if str(kind) == "binary":
            raise UserError(
                f"data.path: column {name!r} of {path!r} is not UTF-8; save the file as UTF-8"
            )
    return table


def _columns(table: Any) -> dict[str, Column]:
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.path: the file has two columns called {name!r}")
    return {name: Column.of(name, table.column(name)) for name in names}


def _movielens(folder: str) -> tuple[dict[str, Column], Choice]:
    """Ratings with the genres of their movies and the hour."""
    ratings = _columns(_arrow(os.path.join(folder, "ratings.csv")))
    for name in ("userId", "movieId", "rating"):
        if name not in ratings:
            raise UserError(
                f"data.path: ratings.csv has no column {name!r}; {suggest(name, ratings)}"
            )
    features, time = ["userId", "movieId"], ""
    if "timestamp" in ratings:
        time = "timestamp"
        hour_N = timestamp(ratings[time]) // 3600 % 24
        ratings["hour"] = Column("hour", hour_N, is_text=False)
        features.append("hour")
    genres: list[Column] = []
    if os.path.exists(os.path.join(folder, "movies.csv")):
        genres = _genres(_columns(_arrow(os.path.join(folder, "movies.csv"))), ratings["movieId"])
    ratings |= {column.name: column for column in genres}
    known = Choice(
        ("rating", "liked=rating>=4"), tuple(features), tuple(c.name for c in genres), time
    )
    return ratings, known


def _genres(movies: dict[str, Column], rated: Column) -> list[Column]:
    """For each genre, whether the movie of each rating has it; 0 for unlisted movies."""
    for name in ("movieId", "genres"):
        if name not in movies:
            raise UserError(
                f"data.path: movies.csv has no column {name!r}; {suggest(name, movies)}"
            )
    lists = [str(text or "").split("|") for text in movies["genres"].values]
    names = sorted({genre for some in lists for genre in some} - {"", "(no genres listed)"})
    place = {str(movie): i for i, movie in enumerate(movies["movieId"].values)}
    ids = rated.values.astype(str) if rated.is_text else rated.values
    each, of_N = np.unique(ids, return_inverse=True)
    row_N = np.array([place.get(str(movie), len(lists)) for movie in each])[of_N]
    found = []
    for genre in names:
        has = np.array([genre in some for some in lists] + [False], dtype=np.float64)
        found.append(Column(f"genre={genre}", has[row_N], is_text=False))
    return found
