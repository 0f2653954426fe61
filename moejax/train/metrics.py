"""Metrics of a run: append-only JSON lines that stay exact across crashes and resumes.

``metrics.jsonl`` holds only what a repeated or resumed run reproduces bit for bit; times and rates
go to ``timings.jsonl``. Every row has an integer ``step``. A row is one write of one line, so a
killed run leaves whole rows and at most one torn last line. Floats are written so that they read
back exactly; those JSON cannot write become the strings "NaN", "Infinity" and "-Infinity", which
Python's ``float`` and JavaScript's ``Number`` accept and `read_rows` turns back.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.files import writing
from moejax.train.mirrors import Mirror, TensorBoard, Wandb
from moejax.train.processes import is_first

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and ``timings.jsonl`` in `workdir`.

    Only the first process of a job writes; on the others every call does nothing.

    Args:
      workdir: made if it is missing.
      resume_step: the step that was restored: rows with a greater `step` are cut off, so that the
        resumed run writes them again, and only once (-1: start over, cut all rows). None for a
        fresh run, which must not find any rows.
      tensorboard, wandb: also write the scalars there (see ``mirrors``).

    Raises:
      UserError: if a fresh run finds rows, a file is not JSON lines, or a mirror cannot be made.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int | None,
        tensorboard: bool = False,
        wandb: bool = False,
    ):
        self._active = is_first()
        self._files: dict[str, int] = {}
        self._mirrors: list[Mirror] = []
        if not self._active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._mirrors.append(TensorBoard(workdir / "tensorboard", resume_step))
        if wandb:
            self._mirrors.append(Wandb(workdir))
        paths = {name: workdir / f"{name}.jsonl" for name in ("metrics", "timings")}
        for path in paths.values():
            with writing(path):
                _prepare(path, resume_step)
        for name, path in paths.items():
            with writing(path):
                self._files[name] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row of reproducible values: numbers, strings, arrays, lists, mappings."""
        self._append("metrics", row)

    def timing(self, row: Mapping[str, Any]) -> None:
        """Appends a row of times and rates, which differ from run to run."""
        self._append("timings", row)

    def flush(self) -> None:
        """Blocks until all rows are on the disk. Call it before a checkpoint of the same step."""
        for name, file in self._files.items():
            with writing(f"{name}.jsonl"):
                os.fsync(file)
        for mirror in self._mirrors:
            mirror.flush()

    def close(self) -> None:
        self.flush()
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        for mirror in self._mirrors:
            mirror.close()
        self._mirrors.clear()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self._active:
            return
        plain = {key: _plain(value) for key, value in row.items()}
        if not isinstance(plain.get("step"), int):
            raise ValueError(f"a row of {name}.jsonl needs an integer step, got {plain}")
        line = json.dumps(plain, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self._files[name], line)
        except OSError as error:
            raise UserError(f"{name}.jsonl cannot be written: {error.strerror}") from error
        if written < len(line):
            raise UserError(f"{name}.jsonl cannot be written: the disk is full")
        for mirror in self._mirrors:
            mirror.add(plain["step"], scalars(name, plain))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `MetricsLog` wrote, without the torn last line of a killed run.

    Raises:
      UserError: if any other line is not a JSON object with an integer `step`.
    """
    return [row for _, row in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line with the row it holds."""
    *whole, torn = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate([*whole, torn], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append((line, {key: revive(value) for key, value in row.items()}))
        elif number <= len(whole):
            raise UserError(f"{path}: line {number} is not a row with a step; remove or mend it")
    return found


def _prepare(path: Path, resume_step: int | None) -> None:
    """Cuts a file back to `resume_step`: to a temporary file, then by a rename."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if resume_step is None:
        raise UserError(
            f"{path} already holds rows of a run that left no checkpoint to resume from; choose "
            "another workdir or remove it"
        )
    kept = b"".join(line + b"\n" for line, row in _lines(path) if row["step"] <= resume_step)
    if kept == path.read_bytes():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _plain(value: Any) -> Any:
    """JSON's types for numbers, strings, arrays (NumPy or JAX), lists and mappings of them."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    array = np.asarray(value)
    if array.dtype.kind not in "biu":
        array = array.astype(np.float64)  # exact for bfloat16, float16 and float32
    return _plain(array.tolist())


def revive(value: Any) -> Any:
    """A value read from a row, with the floats that JSON cannot write as floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [revive(item) for item in value]
    if isinstance(value, dict):
        return {key: revive(item) for key, item in value.items()}
    return value


def scalars(name: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names that mirrors have for them."""
    group = row.get("split", "timing" if name == "timings" else "")
    return {
        f"{group}/{key}" if group else key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, float | int) and not isinstance(value, bool)
    }
