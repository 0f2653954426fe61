"""Columns of a file as numbers: targets, categorical ids, standardised features.

A column stays as in the file until its use is known: a category is an exact value, and only a
quantity becomes a float.
"""

import hashlib
import re
import sys
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.contrib.multitask.tables import Kind, Table, as_rows, make_table, mean_and_spread, take
from moejax.errors import UserError

MISSING = ("", "na", "nan", "n/a", "null", "none")
"""Spellings of a missing value, of numbers and of categories, in upper or lower case."""

LARGEST = float(np.finfo(np.float32).max)

EXACT = 2**53
"""Float64 represents every whole number up to this one, but not beyond."""

_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


class Column(NamedTuple):
    """A column as in the file. ``array``: an array of pyarrow. ``code``: an example of a number
    that looks like an identifier; empty if none does."""

    name: str
    array: Any
    code: str = ""

    @classmethod
    def of(cls, name: str, array: Any) -> "Column":
        """The column of an array or a chunked array of pyarrow."""
        import pyarrow
        from pyarrow import types

        if isinstance(array, pyarrow.ChunkedArray):
            array = array.combine_chunks()
        if types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if types.is_string_view(array.type):
            array = array.cast(pyarrow.large_string())
        if types.is_binary_view(array.type):
            array = array.cast(pyarrow.large_binary())
        if types.is_float16(array.type):
            array = array.cast(pyarrow.float32())
        return cls(name, array, _beyond_exact(array))

    @property
    def is_text(self) -> bool:
        from pyarrow import types

        return types.is_string(self.array.type) or types.is_large_string(self.array.type)

    @property
    def is_category(self) -> bool:
        """True if its values are not quantities: text, booleans, bytes."""
        from pyarrow import types

        kind = self.array.type
        is_bytes = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
        return self.is_text or types.is_boolean(kind) or any(test(kind) for test in is_bytes)

    @property
    def rounded_id(self) -> str:
        """An example of a whole number that may have been rounded to a float: the column holds
        only whole numbers, and this one has up to 64 bits and exceeds the exact range of the type.
        Empty if there is none."""
        from pyarrow import types

        if not types.is_floating(self.array.type):
            return ""
        values = self.array.to_numpy(zero_copy_only=False)
        values = values[np.isfinite(values)]
        exact = 2.0 ** (np.finfo(values.dtype).nmant + 1)
        beyond = values[(np.abs(values) > exact) & (np.abs(values) <= 2.0**64)]
        return str(int(beyond[0])) if beyond.size and (values == np.rint(values)).all() else ""


def _beyond_exact(array: Any) -> str:
    """A whole number of the array beyond ``EXACT``, as text; empty if there is none."""
    from pyarrow import compute, types

    if not (types.is_integer(array.type) or types.is_decimal(array.type)):
        return ""
    if types.is_decimal(array.type) and array.type.scale > 0:
        return ""
    bounds = compute.min_max(array).as_py()  # pyright: ignore[reportAttributeAccessIssue]
    for bound in bounds.values():
        if bound is not None and abs(int(bound)) > EXACT:
            return str(int(bound))
    return ""


class Spec(NamedTuple):
    """A target: its name, its column, and if binary the smallest value that counts as 1."""

    name: str
    column: str
    bound: float | None = None


def parse_spec(text: str, columns: Container[str]) -> Spec:
    """Parse ``column``, ``name=column`` or ``name=column>=number``; column names go first."""
    if text in columns:
        return Spec(text, text)
    match = re.fullmatch(r"(?:([^=<>]+)=)?([^=<>]+?)(?:>=([^=<>]+))?", text)
    if not match:
        raise UserError(f"task.targets: {text!r} is not column, name=column or name=column>=number")
    name, column, bound = match.groups()
    if bound is None:
        return Spec(name or column, column)
    try:
        return Spec(name or text, column, float(bound))
    except ValueError as error:
        raise UserError(f"task.targets: {bound!r} in {text!r} is not a number") from error


def table_of(
    targets: Sequence[tuple[Spec, Column]],
    categorical: Sequence[Column],
    numeric: Sequence[Column],
    heldout_N: np.ndarray,
    min_count: int,
    name: str,
) -> Table:
    """The table, with vocabularies and standardisation computed on the training rows."""
    parsed = [_target(spec, column) for spec, column in targets]
    target_NM = np.stack([values for values, _ in parsed], axis=1)
    ids = [categories(column, heldout_N, min_count) for column in categorical]
    scales = [_mean_and_spread(column, heldout_N) for column in numeric]
    scaled = [_standardised(column, *scale) for column, scale in zip(numeric, scales, strict=True)]
    encoding = (
        [(column.name, one.values) for column, one in zip(categorical, ids, strict=True)],
        [(column.name, *scale[1:]) for column, scale in zip(numeric, scales, strict=True)],
    )
    rows = as_rows(
        np.stack(scaled, axis=1) if scaled else None,
        np.stack([one.id_N for one in ids], axis=1) if ids else None,
        target_NM,
    )
    return make_table(
        take(rows, ~heldout_N),
        take(rows, heldout_N),
        [spec.name for spec, _ in targets],
        [kind for _, kind in parsed],
        dense=tuple(column.name for column in numeric),
        category=tuple(column.name for column in categorical),
        category_sizes=tuple(len(one.values) + 1 for one in ids),
        category_values=tuple(one.values for one in ids),
        encoding=hashlib.sha256(repr(encoding).encode()).hexdigest(),
        name=name,
    )


def numbers(column: Column, field: str) -> np.ndarray:
    """The column as float64, NaN where a value is missing; times as seconds.

    Raises:
      UserError: a value that is not a finite number within float32's range, with its row; or a
        column without numbers.
    """
    values = _floats(column, field)
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        row = infinite[0]
        raise UserError(
            f"task.{field}: {column.name!r} is {values[row]} in row {row + 1}; use finite numbers"
        )
    large = np.flatnonzero(np.abs(values) > LARGEST)
    if large.size:
        row = large[0]
        raise UserError(
            f"task.{field}: {column.name!r} is {values[row]:g} in row {row + 1}, beyond the range "
            f"of float32 ({LARGEST:.2g}); use other units, or leave it empty"
        )
    return values


def _floats(column: Column, field: str) -> np.ndarray:
    import pyarrow
    from pyarrow import types

    array, kind = column.array, column.array.type
    if column.is_text:
        texts = array.to_numpy(zero_copy_only=False)
        return np.array([
            _number(text, column.name, field, row) for row, text in enumerate(texts, start=1)
        ], dtype=np.float64)  # fmt: skip
    if types.is_null(kind):
        return np.full(len(array), np.nan)
    if types.is_boolean(kind):
        array = array.cast(pyarrow.int8())
    elif _is_time(kind):
        ticks, per_second = _ticks(array)
        return ticks.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False) / per_second
    elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)):
        raise UserError(
            f"task.{field}: column {column.name!r} has type {kind}, not numbers; leave it "
            "out" + (" or name it in task.categorical" if column.is_category else "")
        )
    if re.fullmatch(r"[+-]?\d+(\.0*)?", column.code) and abs(float(column.code)) >= EXACT:
        print(
            f"moejax: warning: task.{field}: {column.name!r} has whole numbers beyond 2**53, such "
            f"as {column.code}, which float64 rounds; if they are identifiers, name the column in "
            "task.categorical",
            file=sys.stderr,
        )
    return array.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)


def _is_time(kind: Any) -> bool:
    """True if values are dates, times of day, both, or durations."""
    from pyarrow import types

    tests = (types.is_timestamp, types.is_date, types.is_time, types.is_duration)
    return any(test(kind) for test in tests)


def _ticks(array: Any) -> tuple[Any, float]:
    """Times as the integers in the file, and the number of ticks per second."""
    import pyarrow
    from pyarrow import types

    if types.is_date32(array.type):
        return array.cast(pyarrow.int32()).cast(pyarrow.int64()), 1 / 86_400
    if types.is_time32(array.type):  # a cast to 64 bits would give nanoseconds
        return array.cast(pyarrow.int32()).cast(pyarrow.int64()), _PER_SECOND[array.type.unit]
    unit = "ms" if types.is_date64(array.type) else array.type.unit
    return array.cast(pyarrow.int64()), _PER_SECOND[unit]


def _is_missing(text: str) -> bool:
    return text.strip().lower() in MISSING


def _number(text: str | None, name: str, field: str, row: int) -> float:
    if text is None or _is_missing(text):
        return np.nan
    try:
        return float("" if "_" in text else text)  # Python reads "1_0" as 10
    except ValueError as error:
        raise UserError(
            f"task.{field}: {name!r} is {text!r} in row {row}, which is not a number; correct it, "
            "leave it empty, or leave the column out"
        ) from error


def order_by_time(column: Column) -> np.ndarray:
    """The rows in the exact order of their times; rows with equal times keep the order of the file.

    Raises:
      UserError: a row without a time.
    """
    values = _to_sort_by(column)
    return np.argsort(values, kind="stable")


def _to_sort_by(column: Column) -> np.ndarray:
    import pyarrow
    from pyarrow import types

    array = column.array
    if column.is_text:  # the column is a category too
        array = _parsed(array)
    if _is_time(array.type):
        array, _ = _ticks(array)
    if not types.is_integer(array.type):
        array = pyarrow.array(numbers(column, "time"), from_pandas=True)
    if array.null_count:
        row = array.is_null().to_numpy(zero_copy_only=False).argmax()
        raise UserError(f"task.time: {column.name!r} is missing in row {row + 1}")
    return array.to_numpy(zero_copy_only=False)


def _parsed(array: Any) -> Any:
    """Text as whole numbers or as times if all of it is; otherwise unchanged."""
    import pyarrow

    for kind in (pyarrow.int64(), pyarrow.timestamp("ns")):
        try:
            return array.cast(kind)
        except pyarrow.ArrowInvalid:
            continue
    return array


def _target(spec: Spec, column: Column) -> tuple[np.ndarray, Kind]:
    values = numbers(column, "targets")
    if spec.bound is not None:
        return np.where(np.isnan(values), np.nan, values >= spec.bound), "binary"
    present = values[~np.isnan(values)]
    return values, "binary" if np.isin(present, (0.0, 1.0)).all() else "regression"


def _mean_and_spread(column: Column, heldout_N: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The numbers, with mean and spread of the training rows; spread 0 if they are constant."""
    values = numbers(column, "numeric")
    known = values[~heldout_N]
    known = known[~np.isnan(known)]
    # Compare values: by rounding, a column of nothing but 0.1 has a spread above 0.
    if not known.size or known.min() == known.max():
        return values, 0.0, 0.0
    return values, *mean_and_spread(known)


def _standardised(column: Column, values: np.ndarray, mean: float, spread: float) -> np.ndarray:
    """(x - mean) / spread; 0 where x is missing or constant.

    Raises:
      UserError: a held-out value too many spreads away for float32, with its row.
    """
    if not spread:
        return np.zeros(len(values))
    scaled = np.where(np.isnan(values), 0.0, (values - mean) / spread)
    large = np.flatnonzero(np.abs(scaled) > LARGEST)
    if large.size:
        row = large[0]
        raise UserError(
            f"task.numeric: {column.name!r} is {values[row]:g} in row {row + 1}, "
            f"{scaled[row]:.2g} times the spread of the training rows; leave the column out"
        )
    return scaled


class Categories(NamedTuple):
    """The id of each row, and the values of the ids from 1 on."""

    id_N: np.ndarray
    values: tuple[str, ...]


def categories(column: Column, heldout_N: np.ndarray, min_count: int) -> Categories:
    """Ids from 1 in the order of the values, 0 for missing, rare and unknown values.

    Two values are one category only if they are equal: text letter by letter ("0420" is not "420"),
    everything else by its exact value.

    Raises:
      UserError: a column of lists or other nested values.
    """
    import pyarrow

    if column.rounded_id:
        print(
            f"moejax: warning: task.categorical: {column.name!r} has floats beyond the exact range "
            f"of {column.array.type}, such as {column.rounded_id}, so that several "
            "identifiers may have become one; write the column as integers or text",
            file=sys.stderr,
        )
    array = _one_zero(column.array)
    try:
        encoded = array.dictionary_encode()
    except pyarrow.ArrowNotImplementedError as error:
        raise UserError(
            f"task.categorical: column {column.name!r} has type {array.type}; categories are text, "
            "numbers, times, booleans or bytes"
        ) from error
    known = encoded.dictionary
    code_N = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
    written_V = _written(known)
    missing_V = np.array([text is None or _is_missing(text) for text in written_V] + [True])
    count_V = np.bincount(code_N[~heldout_N], minlength=len(missing_V))
    kept_V = (count_V >= min_count) & ~missing_V
    kept = [v for v in _in_order(known, written_V) if kept_V[v]]
    id_V = np.zeros(len(missing_V), np.int64)
    id_V[kept] = 1 + np.arange(len(kept))
    return Categories(id_V[code_N], tuple(str(written_V[v]) for v in kept))


def _one_zero(array: Any) -> Any:
    """The array with -0.0 replaced by the equal value 0.0."""
    from pyarrow import compute, types

    if not types.is_floating(array.type):
        return array
    return compute.add(array, 0.0)  # pyright: ignore[reportAttributeAccessIssue]


def _written(known: Any) -> list[str | None]:
    """Values as text."""
    import pyarrow
    from pyarrow import types

    of_ns = getattr(known.type, "unit", "") == "ns"  # Python has no such type
    if types.is_duration(known.type) and of_ns:
        known = known.cast(pyarrow.int64())
    elif types.is_timestamp(known.type) or (types.is_time(known.type) and of_ns):
        return known.cast(pyarrow.string()).to_pylist()
    values = known.to_pylist()
    return [
        value if value is None else value.hex() if isinstance(value, bytes) else str(value)
        for value in values
    ]


def _in_order(known: Any, written_V: Sequence[str | None]) -> Sequence[int]:
    """Indices of the values in ascending order; text that holds only numbers sorts as numbers."""
    from pyarrow import compute, types

    if types.is_null(known.type):
        return range(len(known))
    if not (types.is_string(known.type) or types.is_large_string(known.type)):
        order = compute.array_sort_indices(known)  # pyright: ignore[reportAttributeAccessIssue]
        return order.to_pylist()
    texts = [text or "" for text in written_V]
    by_text = sorted(range(len(texts)), key=texts.__getitem__)
    present = [text for text in texts if not _is_missing(text)]
    try:
        number = {text: _exact_number(text) for text in present}
    except ValueError:
        return by_text
    return sorted(by_text, key=lambda v: number.get(texts[v], 0))


def _exact_number(text: str) -> int | float:
    """Whole numbers of any size, which Python compares exactly with floats."""
    try:
        return int(text)
    except ValueError:
        return float(text)
