"""``journal.sqlite`` in a sweep's folder: every trial's attempts, host, times and exit status.

One table, ``trials``, with a row per trial:

    id        hash of the resolved config      handle   the launcher's reference to the job
    name      VARIANT-seedN                    started  start of the last attempt, ISO 8601
    state     one of `STATES`                  ended    end of the last attempt seen to end
    attempts  number of attempts               status   its exit status
    launcher  launcher of the last attempt     seconds  duration of all attempts seen to end
    host      host of the last attempt

Only the runner writes, under the folder's lock. Every write is one transaction that is on disk when
the call returns; SQLite rolls back one that a kill interrupts. An attempt is recorded before its
process starts and again when its handle is known, so a killed runner leaves no process untracked.
The journal never decides whether a trial is finished, its workdir does: a journal that is lost,
corrupt or wrong costs the history and nothing else.

SQLite's rollback journal is used instead of its write-ahead log, which needs memory shared by all
readers: the folder may be on a network file system and be read from another machine.
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
    """A row of the journal; unknown values are None or empty."""

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
    """The journal cannot be read; the message gives the reason."""


class Journal:
    """The journal, opened for writing, as a context manager. Created if missing.

    A corrupt file is moved to ``journal.sqlite.damaged`` and a new one created; `repaired` is then
    true.

    Raises:
      UserError: it cannot be opened or written (a full disk, another version's file).
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self.repaired = False
        try:
            self._open()
        except _Damaged:
            self.repaired = True
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
        """Give each trial a row, in one transaction, with the state that its workdir implies.

        Args:
          finished: whether each trial is finished according to its workdir, by its name.
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
        """Record a new attempt before its process starts."""
        self._write(
            "update trials set state = ?, attempts = attempts + 1, launcher = ?, started = ?, "
            "host = '', handle = '', ended = null, status = null where id = ?",
            RUNNING, launcher, now(), trial.id,
        )  # fmt: skip

    def locate(self, trial: Trial, handle: str, host: str) -> None:
        """Record the job and the host of the running attempt."""
        self._write(
            "update trials set state = ?, handle = ?, host = ? where id = ?",
            RUNNING, handle, host, trial.id,
        )  # fmt: skip

    def end(self, trial: Trial, state: str, status: int | None, seconds: float) -> None:
        """Record the end of an attempt."""
        self._write(
            "update trials set state = ?, status = ?, ended = ?, seconds = seconds + ? "
            "where id = ?",
            state, status, now(), seconds, trial.id,
        )  # fmt: skip

    def mark(self, trial: Trial, state: str) -> None:
        """Set the state of a trial without recording the end of an attempt."""
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
                f"{self._path} was written by another version of moejax ({version}, this one "
                f"writes {_VERSION}); remove it: the workdirs tell which trials are finished"
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
            f"{self._path} cannot be written ({error}); running trials continue, and the same "
            "command waits for them"
        )


class _Damaged(Exception):
    pass


def read(folder: Path) -> dict[str, Entry]:
    """The rows by the trial's name, even while a runner writes; empty without a journal.

    Changes nothing.

    Raises:
      Unreadable: the journal exists but cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
        try:
            (version,) = connection.execute("pragma user_version").fetchone()
            if version not in (0, _VERSION):
                raise Unreadable(f"{path} was written by another version of moejax ({version})")
            return _entries(connection) if version else {}  # 0: it is being made just now
        finally:
            connection.close()
    except sqlite3.Error as error:
        # For instance one left by a kill during a write, which the next writer repairs.
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
