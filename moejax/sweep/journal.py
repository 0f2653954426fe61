"""``journal.sqlite`` in a sweep's folder: what was tried, where, when, and how it ended.

One table, ``trials``, with a row per trial:

    id        hash of the resolved config      handle   what finds the job again
    name      VARIANT-seedN                    started  of the last attempt, ISO 8601
    state     one of `STATES`                  ended    of the last attempt that was seen to end
    attempts  how often it was begun           status   its exit status
    launcher  of the last attempt              seconds  all attempts that were seen to end
    host      of the last attempt

The runner alone writes, under the lock of the folder. Every write is one transaction that is on the
disk when it returns; SQLite takes back what a kill cut short. An attempt is written down before its
process is made and once more when its handle is known, so a killed runner leaves no process that
nobody looks for. That a trial is finished is never decided here but read off its workdir: a journal
that is lost, damaged or wrong costs the history and nothing else.

The rollback journal of SQLite is used and not its write-ahead log, which needs memory that all
readers share: the folder may be on a network file system and be read from another machine.
"""

import dataclasses
import os
import sqlite3
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from moejax.errors import UserError
from moejax.sweep.definition import Trial

NAME = "journal.sqlite"
DAMAGED = f"{NAME}.damaged"
PENDING, RUNNING, DONE, FAILED, PREEMPTED = STATES = (
    "pending", "running", "done", "failed", "preempted",
)  # fmt: skip

_VERSION = 1
_TABLE = f"""
create table if not exists trials (
  id text primary key,
  name text not null unique,
  state text not null check (state in {STATES}),
  attempts integer not null default 0,
  launcher text not null default '',
  host text not null default '',
  handle text not null default '',
  started text,
  ended text,
  status integer,
  seconds real not null default 0
)
"""
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the journal; what is not known is None or empty."""

    id: str
    name: str
    state: str = PENDING
    attempts: int = 0
    launcher: str = ""
    host: str = ""
    handle: str = ""
    started: str | None = None
    ended: str | None = None
    status: int | None = None
    seconds: float = 0.0


class Unreadable(Exception):
    """The journal cannot be read: why, in a few words."""


class Journal:
    """The journal, to write to: a context manager. Made if it is missing.

    A damaged file is moved aside, to ``journal.sqlite.damaged``, and a new one begun; `mended` is
    then true.

    Raises:
      UserError: it cannot be opened or written (a full disk, another version's).
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self.mended = False
        try:
            self._open()
        except _Damaged:
            self.mended = True
            for end in ("", "-journal"):  # an old rollback journal would be played into the new one
                if os.path.exists(f"{self._path}{end}"):
                    os.replace(f"{self._path}{end}", folder / f"{DAMAGED}{end}")
            self._open()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def entries(self) -> dict[str, Entry]:
        """All rows, by the trial's name."""
        return _entries(self._connection)

    def reconcile(self, trials: Iterable[Trial], finished: Mapping[str, bool]) -> None:
        """Makes it a row for each trial, in one transaction; whether one is done, workdirs decide.

        Args:
          finished: by the trial's name, what its workdir says.
        """
        known = self.entries()
        self._write("begin immediate")
        for trial in trials:
            entry = known.get(trial.name)
            if entry is None or entry.id != trial.id:
                self._write("delete from trials where name = ? or id = ?", trial.name, trial.id)
                self._write("insert into trials (id, name, state) values (?, ?, ?)",
                            trial.id, trial.name, PENDING)  # fmt: skip
                entry = Entry(trial.id, trial.name)
            if finished[trial.name] != (entry.state == DONE):
                state = DONE if finished[trial.name] else PENDING
                self._write("update trials set state = ? where id = ?", state, trial.id)
        self._write("commit")

    def begin(self, trial: Trial, launcher: str) -> None:
        """A new attempt, before its process is made: nothing is known of it yet."""
        self._write(
            "update trials set state = ?, attempts = attempts + 1, launcher = ?, started = ?, "
            "host = '', handle = '', ended = null, status = null where id = ?",
            RUNNING, launcher, now(), trial.id,
        )  # fmt: skip

    def place(self, trial: Trial, handle: str, host: str) -> None:
        """Where the running attempt is."""
        self._write(
            "update trials set state = ?, handle = ?, host = ? where id = ?",
            RUNNING, handle, host, trial.id,
        )  # fmt: skip

    def end(self, trial: Trial, state: str, status: int | None, seconds: float) -> None:
        """How the attempt ended, after so many seconds."""
        self._write(
            "update trials set state = ?, status = ?, ended = ?, seconds = seconds + ? "
            "where id = ?",
            state, status, now(), seconds, trial.id,
        )  # fmt: skip

    def mark(self, trial: Trial, state: str) -> None:
        """Another state, without an attempt of which the end was seen."""
        self._write("update trials set state = ? where id = ?", state, trial.id)

    def _open(self) -> None:
        try:
            self._connection = sqlite3.connect(self._path, isolation_level=None)
            try:
                # Also done for a new file, which has version 0 and no table.
                self._check()
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            if _code(error) in _DAMAGE:
                raise _Damaged from error
            raise self._problem(error) from error

    def _check(self) -> None:
        execute = self._connection.execute
        if execute("pragma quick_check").fetchall() != [("ok",)]:
            raise _Damaged
        execute("pragma journal_mode = delete")
        execute("pragma synchronous = full")
        execute("begin immediate")
        (version,) = execute("pragma user_version").fetchone()
        if version not in (0, _VERSION):
            raise UserError(
                f"{self._path} is of another version of moejax ({version}, this one writes "
                f"{_VERSION}); remove it: what is finished is read off the workdirs"
            )
        execute(_TABLE)
        execute(f"pragma user_version = {_VERSION}")
        execute("commit")
        _entries(self._connection)  # a table of this name with other columns is no journal

    def _write(self, statement: str, *values: object) -> None:
        try:
            self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._problem(error) from error

    def _problem(self, error: sqlite3.Error) -> UserError:
        return UserError(
            f"{self._path} cannot be written ({error}); trials that run go on, and the same "
            "command waits for them"
        )


class _Damaged(Exception):
    pass


def read(folder: Path) -> dict[str, Entry]:
    """The rows by the trial's name, also while a runner writes; none without a journal.

    Changes nothing.

    Raises:
      Unreadable: there is a journal, but it cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
        try:
            (version,) = connection.execute("pragma user_version").fetchone()
            if version not in (0, _VERSION):
                raise Unreadable(f"{path} is of another version of moejax ({version})")
            return _entries(connection) if version else {}  # 0: it is being made just now
        finally:
            connection.close()
    except sqlite3.Error as error:
        # Among others the one that a kill in the middle of a write leaves: a writer mends it.
        raise Unreadable(f"{path} cannot be read: {error}") from error


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _entries(connection: sqlite3.Connection) -> dict[str, Entry]:
    columns = [field.name for field in dataclasses.fields(Entry)]
    rows = connection.execute(f"select {', '.join(columns)} from trials order by rowid")
    return {entry.name: entry for entry in (Entry(*row) for row in rows)}


def _code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; errors of the Python module itself have none."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
