"""Columns of a file as numbers: targets, categorical ids, standardised features."""

import re
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.data.tables import Kind, Table, as_rows, make_table, mean_and_spread, take
from moejax.errors import UserError

MISSING = ("", "na", "nan", "n/a", "null", "none")
"""Text that stands for no value, among numbers and among categories, in any case."""

LARGEST = float(np.finfo(np.float32).max)


class Column(NamedTuple):
    """``values``: float64 with NaN for missing ones, or an object array of text and None."""

    name: str
    values: np.ndarray
    is_text: bool
    is_bool: bool = False

    @classmethod
    def of(cls, name: str, array: Any) -> "Column":
        """From a chunked array of pyarrow.

        Raises:
          UserError: a type that is neither numbers, times, booleans nor text.
        """
        import pyarrow
        from pyarrow import types

        kind = array.type
        if types.is_dictionary(kind):
            array, kind = array.cast(kind.value_type), kind.value_type
        if types.is_boolean(kind):
            number = array.cast(pyarrow.int8()).cast(pyarrow.float64())
            return cls(name, number.to_numpy(), is_text=True, is_bool=True)
        if types.is_temporal(kind) and not types.is_time(kind) and not types.is_duration(kind):
            seconds = array.cast(pyarrow.timestamp("us")).cast(pyarrow.int64())
            return cls(name, seconds.cast(pyarrow.float64(), safe=False).to_numpy() / 1e6, False)
        if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
            return cls(name, array.cast(pyarrow.float64(), safe=False).to_numpy(), is_text=False)
        if types.is_string(kind) or types.is_large_string(kind):
            return cls(name, array.to_numpy(), is_text=True)
        if types.is_null(kind):
            return cls(name, np.full(len(array), np.nan), is_text=False)
        raise UserError(f"data.path: column {name!r} has type {kind}; numbers and text are read")


class Spec(NamedTuple):
    """A target: its name, its column, and from what value on it counts as 1."""

    name: str
    column: str
    bound: float | None = None


def parse_spec(text: str, columns: Container[str]) -> Spec:
    """``column``, ``name=column`` or ``name=column>=number``; a column's full name goes first."""
    if text in columns:
        return Spec(text, text)
    found = re.fullmatch(r"(?:([^=<>]+)=)?([^=<>]+?)(?:>=([^=<>]+))?", text)
    if not found:
        raise UserError(f"task.targets: {text!r} is not column, name=column or name=column>=number")
    name, column, bound = found.groups()
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
    """The table, with vocabularies and standardisation of the rows that are not held out."""
    found = [_target(spec, column) for spec, column in targets]
    target_NM = np.stack([values for values, _ in found], axis=1)
    ids = [_ids(column, heldout_N, min_count) for column in categorical]
    scaled = [_standardised(column, heldout_N) for column in numeric]
    rows = as_rows(
        np.stack(scaled, axis=1) if scaled else None,
        np.stack([id_N for id_N, _ in ids], axis=1) if ids else None,
        target_NM,
    )
    return make_table(
        take(rows, ~heldout_N),
        take(rows, heldout_N),
        [spec.name for spec, _ in targets],
        [kind for _, kind in found],
        dense=tuple(column.name for column in numeric),
        category=tuple(column.name for column in categorical),
        category_sizes=tuple(size for _, size in ids),
        name=name,
    )


def numbers(column: Column, field: str) -> np.ndarray:
    """The column as float64, NaN where a value is missing.

    Raises:
      UserError: a value that is no finite number of float32's range, with its row.
    """
    values = column.values
    if values.dtype == object:
        values = np.array([
            _number(text, column.name, field, row) for row, text in enumerate(values, start=1)
        ])  # fmt: skip
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


def _is_missing(text: str) -> bool:
    return text.strip().lower() in MISSING


def _number(text: str | None, name: str, field: str, row: int) -> float:
    if text is None or _is_missing(text):
        return np.nan
    try:
        return float(text)
    except ValueError as error:
        raise UserError(
            f"task.{field}: {name!r} is {text!r} in row {row}, which is no number; correct it, "
            "leave it empty, or leave the column out"
        ) from error


def timestamp(column: Column) -> np.ndarray:
    """The column as numbers to sort by."""
    values = numbers(column, "time")
    missing = np.flatnonzero(np.isnan(values))
    if missing.size:
        raise UserError(f"task.time: {column.name!r} is missing in row {missing[0] + 1}")
    return values


def _target(spec: Spec, column: Column) -> tuple[np.ndarray, Kind]:
    values = numbers(column, "targets")
    if spec.bound is not None:
        return np.where(np.isnan(values), np.nan, values >= spec.bound), "binary"
    present = values[~np.isnan(values)]
    return values, "binary" if np.isin(present, (0.0, 1.0)).all() else "regression"


def _standardised(column: Column, heldout_N: np.ndarray) -> np.ndarray:
    """(x - mean) / spread by the training rows; 0 where x is missing or does not vary.

    Raises:
      UserError: a held-out value too many spreads away for float32, with its row.
    """
    values = numbers(column, "numeric")
    known = values[~heldout_N]
    known = known[~np.isnan(known)]
    # By the values: rounding leaves a spread to a column of nothing but 0.1.
    if not known.size or known.min() == known.max():
        return np.zeros(len(values))
    mean, spread = mean_and_spread(known)
    scaled = np.where(np.isnan(values), 0.0, (values - mean) / spread)
    large = np.flatnonzero(np.abs(scaled) > LARGEST)
    if large.size:
        row = large[0]
        raise UserError(
            f"task.numeric: {column.name!r} is {values[row]:g} in row {row + 1}, "
            f"{scaled[row]:.2g} times the spread of the training rows; leave the column out"
        )
    return scaled


def _ids(column: Column, heldout_N: np.ndarray, min_count: int) -> tuple[np.ndarray, int]:
    """Ids from 1 in the order of the values, 0 for what is missing or unknown; and how many."""
    values = column.values
    if values.dtype == object:
        missing = np.array([text is None or _is_missing(text) for text in values])
        values = np.where(missing, "", values).astype(str)
    else:
        missing = np.isnan(values)
        values = np.where(missing, 0.0, values)
    known, code_N = np.unique(values, return_inverse=True)
    count_V = np.bincount(code_N[~heldout_N & ~missing], minlength=len(known))
    kept_V = count_V >= min_count
    id_V = np.where(kept_V, np.cumsum(kept_V), 0)
    return np.where(missing, 0, id_V[code_N]), int(kept_V.sum()) + 1
