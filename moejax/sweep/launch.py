"""Launchers: the interface between the runner and a machine or a cluster.

A launcher starts a trial's command and returns a job to poll and to stop. A job outlives a killed
runner; the next runner finds it again with `attach`. A new kind of launcher is a class with the
protocol and a line in `LAUNCHERS`::

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
"""The launchers by the name that ``--launcher`` takes: "module:Class", imported when chosen."""

GONE = 256
"""Stands for an unknown exit status of a job that has ended."""


class LaunchError(Exception):
    """A trial could not be started, for the reason in the message. Other trials continue."""


class Job(Protocol):
    """One attempt at a trial."""

    @property
    def handle(self) -> str:
        """One line that lets `Launcher.attach` find the job again; kept in the journal."""
        ...

    @property
    def host(self) -> str:
        """The machine it runs on, "" while unknown, as in a queue. May change."""
        ...

    def poll(self) -> int | None:
        """The exit status of a job that has ended, which never changes; None before.

        Negative: minus the number of the signal that ended it. 75: it was stopped and has saved.
        GONE: unknown. A job that waits, or that a cluster will restart, has not ended. Called
        several times a second: cache an expensive answer for a while.
        """
        ...

    def terminate(self) -> None:
        """Send the trial one SIGTERM, after which it saves and exits; a second one aborts it.

        A job still waiting in a queue is removed from it and has ended with 75. Does nothing to a
        job that has ended.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Start:
    """The arguments of `Launcher.start`."""

    trial: "Trial"
    command: list[str]
    log: Path


class Launcher(Protocol):
    """A launcher, constructed from the sweep's folder and ``--launcher-option key=value`` pairs.

    Raises (in the constructor):
      UserError: an unknown option or a missing requirement. Nothing is written yet.
    """

    @property
    def jobs(self) -> int:
        """The number of trials to run at once without ``--jobs``."""
        ...

    @property
    def queues(self) -> bool:
        """True if it queues trials beyond those that may run at once.

        If so, the runner hands over all missing trials together and does not limit them.
        """
        ...

    def start(self, trial: "Trial", command: list[str], log: Path) -> Job:
        """Start a command that no job is running. Its output is appended to the log file.

        Raises:
          LaunchError: it cannot be started.
        """
        ...

    def start_all(self, starts: Sequence[Start], at_once: int) -> list["Job | LaunchError"]:
        """Start trials that begin together: a job for each, or the error that prevented it.

        ``at_once`` limits how many of them run at a time on a launcher that `queues`.
        """
        ...

    def attach(self, trial: "Trial", handle: str, log: Path) -> Job | None:
        """The running job of a trial that outlived its runner; None if there is none.

        ``handle`` is "" if the runner was killed before it could record the job, or if the journal
        was lost: the job then has to be found by the trial, its folder or its log.
        """
        ...


def make(name: str, folder: Path, options: Mapping[str, str]) -> Launcher:
    """The launcher with a name in `LAUNCHERS`.

    Raises:
      UserError: an unknown option or a missing requirement.
    """
    module, _, attribute = LAUNCHERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(folder, options)


class LocalLauncher:
    """A process on this machine for each trial.

    JAX must not be forked, so each trial gets a fresh process; it leads its own session, so that
    Ctrl-C on the terminal reaches only the runner. The inherited output file carries a lock on the
    log, which is released when the trial and all its children have ended: the log shows whether a
    trial outlived its runner, whatever the runner managed to record.
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
    """True if a local job may still be running, as far as this machine can tell."""
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
    """A child process of this runner."""

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
    """A process that outlived its runner: it runs as long as its log is locked."""

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
        # No other process can get its number while a process of its session holds the lock.
        if self.host == socket.gethostname() and self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.handle.rpartition(":")[2]), signal.SIGTERM)
