"""A lock that keeps a workdir to one writer."""

import contextlib
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from moejax.errors import UserError
from moejax.record.files import cannot_write, parsed
from moejax.train.processes import is_first, shared_problem


class WorkdirLock:
    """Holds ``<workdir>/.lock`` while a run writes to `workdir`; a context manager.

    The lock is an ``flock``: the kernel drops it when the process ends, however it ends, so there
    is no stale lock to remove. The file's content (pid, host, start) is only for the message. In a
    job of several processes the first one holds the lock and all of them get the outcome; with
    ``alone`` this process belongs to no job, and JAX, which would start devices, is not used. A
    child forked without exec shares the lock for as long as it lives.

    Raises (on entering):
      UserError: if another process holds it.
    """

    def __init__(self, workdir: str | Path, alone: bool = False):
        self._workdir, self._alone = Path(workdir), alone
        self._file: int | None = None

    def __enter__(self) -> "WorkdirLock":
        if self._alone:
            problem = self._acquire()
        else:
            problem = shared_problem(self._acquire() if is_first() else "")
        if problem:
            self._release()
            raise UserError(problem)
        return self

    def __exit__(self, *exc: object) -> None:
        self._release()

    def _acquire(self) -> str:
        """Takes the lock and returns "", or a message that names its owner."""
        path = self._workdir / ".lock"
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return cannot_write(path, error)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _describe_owner(os.read(file, 1000))
            os.close(file)
            return (
                f"workdir {self._workdir} is in use by {owner}; wait for it, stop it, or choose "
                "another workdir"
            )
        start = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": start}
        self._file = file
        with contextlib.suppress(OSError):  # it only serves the message of others
            os.ftruncate(file, 0)
            os.write(file, json.dumps(owner).encode())
        return ""

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)  # the file stays: removing it would race with the next owner
            self._file = None


def _describe_owner(written: bytes) -> str:
    try:
        owner = parsed(written)
        return f"process {owner['pid']} on {owner['host']} since {owner['start']}"
    except (ValueError, KeyError, TypeError):  # between the lock and the write; a full disk
        return "another process"
