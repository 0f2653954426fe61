"""Where trials run: the seam between the runner and a machine, or a cluster.

A launcher starts a trial's command and gives a job to ask and to stop. A job lives on when the
runner is killed; the next runner finds it again with `attach`. A new kind of launcher is a class
with the protocol and a line in `LAUNCHERS`::

    class MyLauncher:
        def __init__(self, folder: Path, options: Mapping[str, str]): ...
"""

import contextlib
import dataclasses
import fcntl
import importlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from moejax.errors import UserError

if TYPE_CHECKING:  # the command line reads LAUNCHERS; it needs no more
    from moejax.sweep.definition import Trial

LAUNCHERS = {
    "local": "moejax.sweep.launch:LocalLauncher",
    "slurm": "moejax.sweep.slurm:SlurmLauncher",
}
"""By the name that ``--launcher`` takes: "module:Class", imported when it is chosen."""

GONE = 256
"""In place of an exit status: the job has ended and nobody can say how."""


class LaunchError(Exception):
    """A trial could not be started: why, in one line. The trial has failed; the others go on."""


class Job(Protocol):
    """One attempt at a trial."""

    @property
    def handle(self) -> str:
        """What `Launcher.attach` needs to find the job again, on one line; kept in the journal."""
        ...

    @property
    def host(self) -> str:
        """The machine it runs on; "" while that is not known, as in a queue. May change."""
        ...

    def poll(self) -> int | None:
        """Its exit status once it has ended, the same ever after; None while it has not.

        Negative: minus the number of the signal that ended it. 75: it was stopped and has saved.
        GONE: unknown. A job that waits, or will be started again by a cluster, has not ended.
        Called several times a second: keep an answer that is costly to get for a while.
        """
        ...

    def terminate(self) -> None:
        """Sends the trial one SIGTERM, at which it saves and leaves; a second one aborts it.

        A job that still waits in a queue is taken out of it and has ended with 75. Does nothing
        to a job that has ended.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Start:
    """What `Launcher.start` takes."""

    trial: "Trial"
    command: list[str]
    log: Path


class Launcher(Protocol):
    """Made of the sweep's folder and the ``--launcher-option key=value`` pairs.

    Raises (when made):
      UserError: an unknown option, or something that it needs is missing. Nothing is written yet.
    """

    @property
    def jobs(self) -> int:
        """How many trials at once, unless ``--jobs`` says it."""
        ...

    @property
    def queues(self) -> bool:
        """Whether it has a queue of its own, for trials beyond those that may run at once.

        Then the runner hands over all that are missing together, and counts none of them.
        """
        ...

    def start(self, trial: "Trial", command: list[str], log: Path) -> Job:
        """Starts a command that no job is running now. Its output is appended to the log, a file.

        Raises:
          LaunchError: it cannot be started.
        """
        ...

    def start_all(self, starts: Sequence[Start], at_once: int) -> list["Job | LaunchError"]:
        """`start` for trials that begin together: a job for each, or why it has none.

        ``at_once`` is how many of them a launcher that `queues` lets run at a time.
        """
        ...

    def attach(self, trial: "Trial", handle: str, log: Path) -> Job | None:
        """The job of a trial that outlived its runner; None if there is none that has not ended.

        ``handle`` is "" when the runner was killed before it could note the job, or the journal was
        lost: then the job must be found by the trial, its folder or its log.
        """
        ...


def make(name: str, folder: Path, options: Mapping[str, str]) -> Launcher:
    """The launcher of a name in `LAUNCHERS`.

    Raises:
      UserError: an option that it does not take, or something that it needs is missing.
    """
    module, _, attribute = LAUNCHERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(folder, options)


class LocalLauncher:
    """A process on this machine for each trial.

    JAX must not be forked, so it is a fresh one; it leads a session of its own, so that Ctrl-C on
    the terminal reaches the runner alone. Its output, which it inherits, carries a lock on the log.
    The lock ends when the trial and everything that it started have: that a trial outlived its
    runner can be seen on its log, whatever the runner could still write down.
    """

    jobs = 1
    queues = False

    def __init__(self, folder: Path, options: Mapping[str, str]):
        if options:
            raise UserError(
                f"--launcher-option {next(iter(options))}=...: the launcher 'local' takes no "
                "options; remove it, or name another --launcher"
            )

    def start(self, trial: "Trial", command: list[str], log: Path) -> Job:
        try:
            with open(log, "ab") as output:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise LaunchError(f"its process cannot be started: {error}") from error
        return _Child(process)

    def start_all(self, starts: Sequence[Start], at_once: int) -> list[Job | LaunchError]:
        jobs: list[Job | LaunchError] = []
        for start in starts:
            try:
                jobs.append(self.start(start.trial, start.command, start.log))
            except LaunchError as error:
                jobs.append(error)
        return jobs

    def attach(self, trial: "Trial", handle: str, log: Path) -> Job | None:
        if not log.exists():
            return None
        job = _Outlived(open(log, "ab"), handle)
        return job if job.poll() is None else None


def may_live(handle: str) -> bool:
    """Whether a local job may run still, as far as this machine can tell. Disturbs nobody."""
    host, _, number = handle.rpartition(":")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@dataclasses.dataclass(frozen=True)
class _Child:
    """A process of this runner."""

    process: "subprocess.Popen[bytes]"
    host: str = dataclasses.field(default_factory=socket.gethostname)

    @property
    def handle(self) -> str:
        return f"{self.host}:{self.process.pid}"

    def poll(self) -> int | None:
        return self.process.poll()

    def terminate(self) -> None:
        self.process.terminate()


@dataclasses.dataclass(frozen=True)
class _Outlived:
    """A process of a runner that was killed: as long as its log is locked, it runs."""

    log: IO[bytes]
    handle: str

    @property
    def host(self) -> str:
        return self.handle.rpartition(":")[0]

    def poll(self) -> int | None:
        if self.log.closed:
            return GONE
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        self.log.close()
        return GONE

    def terminate(self) -> None:
        # No other process can have its number while one of its session, which holds the lock, runs.
        if self.host == socket.gethostname() and self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.handle.rpartition(":")[2]), signal.SIGTERM)
