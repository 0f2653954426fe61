"""Metrics of a run: append-only JSON lines that stay exact across crashes and resumes.

``metrics.jsonl`` holds only what a repeated or resumed run reproduces bit for bit; times and rates
go to ``timings.jsonl``. Every row has an integer ``step``; ``moejax.record.files`` has the format.

A checkpoint is saved with the `Count` of each log. If a log holds less, the difference is a `Gap`,
which is printed and kept in the run's history.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moejax.config.saved import METRICS, TIMINGS
from moejax.errors import UserError
from moejax.record import files
from moejax.train.metrics.mirrors import Mirror, TensorBoard, Wandb
from moejax.train.processes import is_first

LOGS = (METRICS, TIMINGS)


class Count(NamedTuple):
    """The content of a log at some moment."""

    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "Count":
        return cls(content.count(b"\n"), len(content), hashlib.sha256(content).hexdigest())


class Gap(NamedTuple):
    """Missing rows of a log: ``rows`` of the ``of`` that were written; 0 if some were altered."""

    log: str
    rows: int
    of: int

    def __str__(self) -> str:
        if self.rows:
            return f"{self.log} lacks {self.rows} of the {self.of} rows that the run wrote"
        return f"{self.log} holds other rows than the {self.of} that the run wrote"


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and ``timings.jsonl`` in `workdir`.

    Only the first process of a job writes; on the others every call does nothing. ``gaps`` lists
    the rows found missing so far.

    Args:
      workdir: made if it is missing.
      resume_step: the step that was restored: rows with a greater `step` are cut off, so that the
        resumed run writes them again, and only once (-1: start over, cut all rows). None for a
        fresh run, which must not find any rows.
      tensorboard, wandb: also write the scalars there (see ``mirrors``).
      counts: the result of `counts` when that step was saved, by log; a log that it does not name
        is not compared.

    Raises:
      UserError: if a fresh run finds rows, a file is not JSON lines, or a mirror cannot be made.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int | None,
        tensorboard: bool = False,
        wandb: bool = False,
        counts: Mapping[str, Any] | None = None,
    ):
        self._active = is_first()
        self._logs: dict[str, _Log] = {}
        self._mirrors: list[Mirror] = []
        self.gaps: list[Gap] = []
        if not self._active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._mirrors.append(TensorBoard(workdir / "tensorboard", resume_step))
        if wandb:
            self._mirrors.append(Wandb(workdir))
        kept = {}
        for name in LOGS:
            with files.writing(workdir / name):
                kept[name] = _prepare(workdir / name, resume_step)
        for name, content in kept.items():
            if counts and name in counts:
                self._compare(name, Count(*counts[name]), content)
            with files.writing(workdir / name):
                self._logs[name] = _Log(workdir / name, content, self._add_gap)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row of reproducible values: numbers, strings, arrays, lists, mappings."""
        self._append(METRICS, row)

    def timing(self, row: Mapping[str, Any]) -> None:
        """Appends a row of times and rates, which differ from run to run."""
        self._append(TIMINGS, row)

    def flush(self) -> None:
        """Blocks until all rows are on the disk. Call it before a checkpoint of the same step."""
        for name, log in self._logs.items():
            with files.writing(name):
                log.flush()
        for mirror in self._mirrors:
            mirror.flush()

    def counts(self) -> dict[str, Count]:
        """The count of each log, to be saved with a checkpoint of the same step."""
        return {name: log.count() for name, log in self._logs.items()}

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        for mirror in self._mirrors:
            mirror.close()
        self._mirrors.clear()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if not self._active:
            return
        line = files.line_of(row)
        self._logs[name].append(line)
        plain = {key: files.plain(value) for key, value in row.items()}
        for mirror in self._mirrors:
            mirror.add(plain["step"], scalars(name, plain))

    def _compare(self, name: str, written: Count, content: bytes) -> None:
        present = Count.of(content)
        if present != written:
            self._add_gap(Gap(name, max(0, written.rows - present.rows), written.rows))

    def _add_gap(self, gap: Gap) -> None:
        self.gaps.append(gap)
        warn(f"{gap}; the remaining rows are kept")


class _Log:
    """One file that rows are appended to, and its expected content."""

    def __init__(self, path: Path, content: bytes, add_gap: Callable[[Gap], None]):
        self._path, self._add_gap = path, add_gap
        self._file = self._open()
        self._rows, self._size = content.count(b"\n"), len(content)
        self._digest = hashlib.sha256(content)

    def append(self, line: bytes) -> None:
        """Writes a line at the end of the file, and the file again if it was removed or replaced.

        Raises:
          UserError: it cannot be written.
        """
        self._check_file()
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise UserError(f"{self._path.name} cannot be written: {error.strerror}") from error
        if written < len(line):
            self._size += written
            raise UserError(f"{self._path.name} cannot be written: the disk is full")
        self._rows, self._size = self._rows + 1, self._size + len(line)
        self._digest.update(line)

    def count(self) -> Count:
        return Count(self._rows, self._size, self._digest.hexdigest())

    def flush(self) -> None:
        self._check_file()
        with files.writing(self._path.name):
            os.fsync(self._file)

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def _open(self) -> int:
        with files.writing(self._path):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def _check_file(self) -> None:
        """Makes sure that the path still leads to the file, and that its content is as written."""
        try:
            at_path = os.stat(self._path)
        except FileNotFoundError:
            at_path = None
        if at_path is None or not os.path.samestat(os.fstat(self._file), at_path):
            self._rewrite()
        size = os.fstat(self._file).st_size
        if size != self._size:
            content, written = _whole_of(self._file, size), self._rows
            self._rows, self._size = content.count(b"\n"), size
            self._digest = hashlib.sha256(content)
            self._add_gap(Gap(self._path.name, max(0, written - self._rows), written))

    def _rewrite(self) -> None:
        """Writes a file again that somebody has removed or replaced by another one."""
        content = _whole_of(self._file, os.fstat(self._file).st_size)
        name, folder, n = self._path.name, self._path.parent, 0
        if not folder.is_dir():
            raise UserError(
                f"{self._path} was removed with its folder, which the run cannot do without"
            )
        what = f"{name} was removed"
        if self._path.exists():
            while (other := folder / f"{name}.other-{n}").exists():
                n += 1
            with files.writing(other):
                self._path.rename(other)
            what = f"{name} was replaced by another file, which is {other.name} now"
        files.write_whole(self._path, content)
        os.close(self._file)
        self._file = self._open()
        warn(f"{what} during the run; written again with all of its rows")


def _whole_of(file: int, size: int) -> bytes:
    parts, at = [], 0
    while at < size and (part := os.pread(file, size - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _prepare(path: Path, resume_step: int | None) -> bytes:
    """Cuts a file back to `resume_step`; returns the rest."""
    if not path.exists() or path.stat().st_size == 0:
        return b""
    if resume_step is None:
        raise UserError(
            f"{path} already holds rows of a run that left no checkpoint to resume from; choose "
            "another workdir or remove it"
        )
    rows = files.read_lines(path)
    kept = b"".join(line + b"\n" for line, row in rows if row["step"] <= resume_step)
    if kept != path.read_bytes():
        files.write_whole(path, kept)
    return kept


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"moejax: warning: {message}", file=sys.stderr, flush=True)


def scalars(name: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log's row, by the names that mirrors use for them."""
    group = row.get("split", "timing" if name == TIMINGS else "")
    return {
        f"{group}/{key}" if group else key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, float | int) and not isinstance(value, bool)
    }
