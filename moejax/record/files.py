"""The files of runs: atomic writes, JSON with a digest, and JSON lines.

A row of JSON lines is one write of one line, so a killed run leaves complete rows and at most one
torn last line. Floats read back exactly; those that JSON cannot write become the strings "NaN",
"Infinity" and "-Infinity", which Python's ``float`` and JavaScript's ``Number`` accept and
`decode_floats` turns back.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError

Row = dict[str, Any]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BLOCK = 1 << 16


# ---------------------------------------------------------------- atomic writes


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""A full disk or quota, a disk that cannot be written to, a file of the largest allowed size."""


def cannot_write(path: str | Path, error: OSError) -> str:
    """An error message for a file that could not be written, with the remedy."""
    why = error.strerror or str(error)
    return f"{path} cannot be written: {why}; make room or fix the disk and run again"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError inside into a one-line error that names the file.

    Raises:
      UserError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """``atomically`` with a one-line error, for a file whose folder may be missing.

    Raises:
      UserError: instead of OSError.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomically(path) as temporary:
            yield temporary


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` in one rename at the end.

    On any error ``path`` stays as it was and nothing is left beside it. The new file survives a
    power cut. The temporary name is hidden: a folder that holds nothing else counts as empty.

    Raises:
      OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Blocks until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file of text (UTF-8, with unchanged line ends) or bytes, atomically."""
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object, atomically."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------- JSON with a digest


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself.

    Raises:
      TypeError: it holds a value that JSON cannot.
    """
    plain_body = json.loads(json.dumps(body))  # tuples become lists, so that the digest holds later
    return {**plain_body, "digest": _digest(plain_body)}


def unsealed(content: Any) -> dict[str, Any] | None:
    """The object that was passed to `sealed`; None if the digest does not match."""
    if not isinstance(content, dict):
        return None
    body = {key: value for key, value in content.items() if key != "digest"}
    return body if content.get("digest") == _digest(body) else None


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is no JSON, or is nested more deeply than Python can parse.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- JSON lines


def line_of(row: Mapping[str, Any]) -> bytes:
    """The line for a row of numbers, strings, arrays, lists and mappings.

    Raises:
      ValueError: it has no integer ``step``.
    """
    values = {key: plain(value) for key, value in row.items()}
    if not isinstance(values.get("step"), int):
        raise ValueError(f"a row needs an integer step, got {values}")
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file, without the torn last line of a killed run.

    Raises:
      UserError: it cannot be read, or any other line is not a JSON object with an integer `step`.
    """
    return [row for _, row in read_lines(Path(path))]


def read_lines(path: Path) -> list[tuple[bytes, Row]]:
    """Every complete line with its row; see `read_rows`."""
    try:
        lines, bad = _parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is {path.parent} the workdir of a run?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if bad:
        raise UserError(f"{path}: line {bad[0]} is not a row with a step; remove or fix it")
    return lines


def read_valid_rows(path: Path, fits: Callable[[Row], bool] = bool) -> tuple[list[Row], list[int]]:
    """The rows of a file that satisfy ``fits``, and the numbers of its other lines.

    The torn last line of a killed run does not count: the run writes it again when it resumes.

    Raises:
      OSError: the file cannot be read.
    """
    lines, bad = _parse(path.read_bytes(), fits)
    return [row for _, row in lines], bad


def _parse(
    content: bytes, fits: Callable[[Row], bool] = bool
) -> tuple[list[tuple[bytes, Row]], list[int]]:
    lines, bad = [], []
    *whole, torn = content.split(b"\n")
    for number, line in enumerate([*whole, torn], start=1):
        row = {key: decode_floats(value) for key, value in _row(line).items()}
        if row and fits(row):
            lines.append((line, row))
        elif number <= len(whole):
            bad.append(number)
    return lines, bad


def last_row(path: Path, split: str = "") -> Row:
    """The last complete row (of a split), empty if there is none; reads no more than it needs.

    The file may be missing or growing.

    Raises:
      UserError: it exists and cannot be read.
    """
    size = _BLOCK
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while True:
                start = max(0, end - size)
                file.seek(start)
                pieces = file.read(end - start).split(b"\n")
                for line in reversed(pieces[start > 0 : -1]):  # without torn lines at both ends
                    row = _row(line)
                    if row and split in ("", row.get("split")):
                        return row
                if start == 0:
                    return {}
                size *= 8
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _row(line: bytes) -> Row:
    try:
        row = parsed(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def plain(value: Any) -> Any:
    """Numbers, strings, arrays (NumPy or JAX), lists and mappings of them in JSON's types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    array = np.asarray(value)
    if array.dtype.kind not in "biu":
        array = array.astype(np.float64)  # exact for bfloat16, float16 and float32
    return plain(array.tolist())


def decode_floats(value: Any) -> Any:
    """A value from a row, with the strings for non-finite numbers turned back into floats."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [decode_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: decode_floats(item) for key, item in value.items()}
    return value
