"""The trials that run now: started, looked at, signalled, and what has come of them noted."""

import dataclasses
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from moejax.errors import UserError
from moejax.record.files import writing
from moejax.sweep import folder as folders
from moejax.sweep import journal, launch, live
from moejax.sweep.definition import Sweep, Trial, changed
from moejax.sweep.journal import Entry, Journal
from moejax.sweep.launch import GONE, Job, Launcher, LaunchError, Start
from moejax.sweep.signals import Signals

DONE, FAILED, STOPPED = 0, 1, 75

_TAIL_LINES = 15
_TAIL_BYTES = 20_000
_POLL_SECONDS = 0.05
_GO_ON = "the same command goes on with the sweep"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how the trials of a sweep run."""

    sweep: Sweep
    folder: Path
    launcher: Launcher
    launcher_name: str
    command: Callable[[Trial], list[str]]
    """The command line of a trial."""

    def log_of(self, trial: Trial) -> Path:
        return folders.log_of(self.folder, trial)


@dataclasses.dataclass
class _Attempt:
    trial: Trial
    job: Job
    host: str
    began: float
    """By the monotonic clock."""
    log_begin: int
    """The byte of the log at which the output of this attempt begins."""
    own: bool
    """Started by this runner, and not by one that was killed."""


class Pool:
    """Runs trials, at most ``jobs`` at once.

    Args:
      numbers: by the trial's name, what lines about it begin with.
    """

    def __init__(
        self,
        place: Place,
        jobs: int,
        record: Journal,
        screen: live.Screen,
        signals: Signals,
        numbers: Mapping[str, str],
    ):
        self._place, self._jobs, self._record = place, jobs, record
        self._screen, self._signals, self._numbers = screen, signals, numbers
        self._running: list[_Attempt] = []
        self._failed = self._stopped = False

    def run(self, waiting: list[Trial]) -> int:
        """Runs trials in their order; those that a killed runner left running have begun already.

        Returns 0 when all are finished, 1 when some failed, 75 when some were stopped.

        Raises:
          UserError: a trial may run where this runner cannot look, or the journal cannot be
            written. Trials that run go on.
        """
        waiting = [trial for trial in waiting if not self._attach(trial)]
        while self._running or (waiting and not self._signals.asked):
            while (room := self._room(len(waiting))) and not self._signals.asked:
                self._begin(waiting[:room])
                del waiting[:room]
            if self._signals.to_pass_on():
                self._pass_on()
            for attempt in list(self._running):
                waiting[:0] = self._look_at(attempt)
            self._screen.update()
            if self._running:
                time.sleep(_POLL_SECONDS)
        if waiting and not self._stopped:
            self._screen.say(f"stopped between two trials; {_GO_ON}")
        if self._failed and not self._signals.asked:
            return FAILED
        if waiting or self._stopped:
            return STOPPED
        return FAILED if self._failed else DONE

    def _room(self, waiting: int) -> int:
        """How many of the trials that wait can be handed to the launcher."""
        if self._place.launcher.queues:
            return waiting
        return min(waiting, max(0, self._jobs - len(self._running)))

    def _say(self, trial: Trial, what: str) -> None:
        self._screen.say(f"{self._numbers[trial.name]} {what}")

    def _attach(self, trial: Trial) -> bool:
        """Whether the trial is running, begun by a runner that was killed."""
        entry, log = self._record.entries()[trial.name], self._place.log_of(trial)
        job = self._launcher_of(entry).attach(trial, entry.handle, log)
        if job is None:
            if entry.state == journal.RUNNING:  # it was killed as well
                self._record.mark(trial, journal.PREEMPTED)
            return False
        self._say(trial, "is still running, begun by a runner that was killed; waiting for it")
        self._record.place(trial, job.handle, job.host)
        age = _age(entry.started) if entry.state == journal.RUNNING else 0.0
        begin, began = log.stat().st_size if log.exists() else 0, time.monotonic() - age
        self._running.append(_Attempt(trial, job, job.host, began, begin, own=False))
        return True

    def _launcher_of(self, entry: Entry) -> Launcher:
        """The launcher that has begun a trial which may still run, else the one of this runner.

        Raises:
          UserError: this machine does not have that launcher.
        """
        place = self._place
        if entry.state != journal.RUNNING or entry.launcher == place.launcher_name:
            return place.launcher
        try:
            return launch.make(entry.launcher, place.folder, {})
        except (UserError, KeyError) as error:
            raise UserError(
                f"trial {entry.name!r} was begun with --launcher={entry.launcher} and may still "
                f"run; use that launcher again ({error})"
            ) from error

    def _begin(self, trials: list[Trial]) -> None:
        """Starts trials together. The journal knows of an attempt before there is a job of it."""
        starts, begins = [], []
        for trial in trials:
            problem = changed(self._place.sweep, trial)
            if problem:
                self._record.mark(trial, journal.FAILED)
                self._not_begun(trial, problem)
                continue
            self._say(trial, "...")
            self._record.begin(trial, self._place.launcher_name)
            start = Start(trial, self._place.command(trial), self._place.log_of(trial))
            try:
                begins.append(_head(start.log, start.command))
            except OSError as error:
                self._record.end(trial, journal.FAILED, None, 0.0)
                self._not_begun(trial, str(error))
                continue
            starts.append(start)
        if not starts:
            return
        jobs = self._place.launcher.start_all(starts, self._jobs)
        for start, job, begin in zip(starts, jobs, begins, strict=True):
            trial = start.trial
            if isinstance(job, LaunchError):
                self._record.end(trial, journal.FAILED, None, 0.0)
                self._not_begun(trial, str(job))
                continue
            self._record.place(trial, job.handle, job.host)
            attempt = _Attempt(trial, job, job.host, time.monotonic(), begin, own=True)
            self._running.append(attempt)

    def _not_begun(self, trial: Trial, problem: str) -> None:
        self._failed = True
        self._say(trial, f"failed: {problem}")

    def _pass_on(self) -> None:
        """One signal for each trial; those that cannot be reached are left alone."""
        for attempt in list(self._running):
            attempt.job.terminate()
            if not attempt.job.handle:
                self._running.remove(attempt)
                self._say(attempt.trial, f"goes on: its process is not known; {_GO_ON}")
                self._stopped = True

    def _look_at(self, attempt: _Attempt) -> list[Trial]:
        """Takes note of a job that ended, or moved. Returns its trial if it is to start again."""
        trial, job = attempt.trial, attempt.job
        status = job.poll()
        if status is None:
            if job.host != attempt.host:
                attempt.host = job.host
                self._record.place(trial, job.handle, job.host)
            return []
        self._running.remove(attempt)
        seconds = time.monotonic() - attempt.began
        known, asked = None if status == GONE else status, self._signals.asked
        if status in (0, GONE) and folders.finished(self._place.folder, trial):
            self._record.end(trial, journal.DONE, known, seconds)
            self._say(trial, f"done in {seconds:.0f} s" if attempt.own else "done")
        elif status == STOPPED or (asked and (status < 0 or status == GONE)):
            self._record.end(trial, journal.PREEMPTED, known, seconds)
            self._say(trial, f"stopped{'' if asked else ' by someone else'}; {_GO_ON}")
            self._stopped = True
        elif status == GONE and not attempt.own:
            self._record.end(trial, journal.PREEMPTED, None, seconds)
            return [trial]
        else:
            self._record.end(trial, journal.FAILED, known, seconds)
            self._fail(attempt, status, seconds)
        return []

    def _fail(self, attempt: _Attempt, status: int, seconds: float) -> None:
        self._failed = True
        log = self._place.log_of(attempt.trial)
        self._say(attempt.trial, f"{ended(status)} after {seconds:.0f} s; the end of {log}:")
        for line in tail(log, attempt.log_begin):
            self._screen.say(f"    | {line}")


def ended(status: int) -> str:
    """In words, how a job ended that left no finished trial."""
    if status == 0:
        return "left no finished run of this trial"
    if status == GONE:
        return "failed, nobody knows with which status,"
    if status > 0:
        return f"failed with status {status}"
    memory = " (perhaps for want of memory)" if -status == signal.SIGKILL else ""
    return f"failed: {signal.Signals(-status).name}{memory}"


def tail(path: Path, begin: int = 0) -> list[str]:
    """The last lines of a log from byte ``begin`` on, without empty ones."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _head(log: Path, command: list[str]) -> int:
    """Begins an attempt's part of a log with its time and command; where the output will begin."""
    start = datetime.now().astimezone().isoformat(timespec="seconds")
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"# {start}  {shlex.join(command)}\n".encode(errors="surrogateescape"))
            return file.tell()


def _age(started: str | None) -> float:
    """Seconds since a time of the journal."""
    if started is None:
        return 0.0
    now = datetime.now().astimezone()
    return max(0.0, (now - datetime.fromisoformat(started)).total_seconds())
