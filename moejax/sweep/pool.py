"""The pool of running trials: starts, polls and signals them and records how they end."""

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
from moejax.sweep import journal, launch
from moejax.sweep.definition import Sweep, Trial, changed
from moejax.sweep.journal import Entry, Journal
from moejax.sweep.launch import GONE, Job, Launcher, LaunchError, Start
from moejax.sweep.screen import Screen
from moejax.sweep.signals import Signals

DONE, FAILED, STOPPED = 0, 1, 75

_TAIL_LINES = 15
_TAIL_BYTES = 20_000
_POLL_SECONDS = 0.05
_RESUME = "run the same command again to resume the sweep"


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A sweep with its folder and launcher."""

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
    """Start on the monotonic clock."""
    log_begin: int
    """The byte of the log at which the output of this attempt begins."""
    own: bool
    """True if this runner started it, and not an earlier one that was killed."""


class Pool:
    """Runs trials, at most ``jobs`` at once.

    Args:
      numbers: the prefix of lines about each trial, by its name.
    """

    def __init__(
        self,
        sweep_run: SweepRun,
        jobs: int,
        record: Journal,
        screen: Screen,
        signals: Signals,
        numbers: Mapping[str, str],
    ):
        self._sweep_run, self._jobs, self._record = sweep_run, jobs, record
        self._screen, self._signals, self._numbers = screen, signals, numbers
        self._running: list[_Attempt] = []
        self._failed = self._stopped = False

    def run(self, waiting: list[Trial]) -> int:
        """Run trials in order, after adopting those that a killed runner left running.

        Returns 0 if all are finished, 1 if some failed, 75 if some were stopped.

        Raises:
          UserError: a trial may be running where this runner cannot reach it, or the journal cannot
            be written. Running trials continue.
        """
        waiting = [trial for trial in waiting if not self._attach(trial)]
        while self._running or (waiting and not self._signals.asked):
            while (room := self._room(len(waiting))) and not self._signals.asked:
                self._begin(waiting[:room])
                del waiting[:room]
            if self._signals.to_pass_on():
                self._pass_on()
            for attempt in list(self._running):
                waiting[:0] = self._poll(attempt)
            self._screen.update()
            if self._running:
                time.sleep(_POLL_SECONDS)
        if waiting and not self._stopped:
            self._screen.say(f"stopped between two trials; {_RESUME}")
        if self._failed and not self._signals.asked:
            return FAILED
        if waiting or self._stopped:
            return STOPPED
        return FAILED if self._failed else DONE

    def _room(self, waiting: int) -> int:
        """The number of waiting trials that can be handed to the launcher."""
        if self._sweep_run.launcher.queues:
            return waiting
        return min(waiting, max(0, self._jobs - len(self._running)))

    def _say(self, trial: Trial, what: str) -> None:
        self._screen.say(f"{self._numbers[trial.name]} {what}")

    def _attach(self, trial: Trial) -> bool:
        """Adopt the trial if a killed runner left it running; return whether it did."""
        entry, log = self._record.entries()[trial.name], self._sweep_run.log_of(trial)
        job = self._launcher_of(entry).attach(trial, entry.handle, log)
        if job is None:
            if entry.state == journal.RUNNING:  # it was killed as well
                self._record.mark(trial, journal.PREEMPTED)
            return False
        self._say(trial, "is still running, started by a runner that was killed; waiting for it")
        self._record.locate(trial, job.handle, job.host)
        age = _age(entry.started) if entry.state == journal.RUNNING else 0.0
        begin, began = log.stat().st_size if log.exists() else 0, time.monotonic() - age
        self._running.append(_Attempt(trial, job, job.host, began, begin, own=False))
        return True

    def _launcher_of(self, entry: Entry) -> Launcher:
        """The launcher that started a trial which may still run, otherwise this runner's.

        Raises:
          UserError: this machine does not have that launcher.
        """
        own = self._sweep_run
        if entry.state != journal.RUNNING or entry.launcher == own.launcher_name:
            return own.launcher
        try:
            return launch.make(entry.launcher, own.folder, {})
        except (UserError, KeyError) as error:
            raise UserError(
                f"trial {entry.name!r} was started with --launcher={entry.launcher} and may still "
                f"be running; use that launcher again ({error})"
            ) from error

    def _begin(self, trials: list[Trial]) -> None:
        """Start trials together. The journal records an attempt before its job exists."""
        starts, begins = [], []
        for trial in trials:
            problem = changed(self._sweep_run.sweep, trial)
            if problem:
                self._record.mark(trial, journal.FAILED)
                self._not_begun(trial, problem)
                continue
            self._say(trial, "...")
            self._record.begin(trial, self._sweep_run.launcher_name)
            start = Start(trial, self._sweep_run.command(trial), self._sweep_run.log_of(trial))
            try:
                begins.append(_head(start.log, start.command))
            except OSError as error:
                self._record.end(trial, journal.FAILED, None, 0.0)
                self._not_begun(trial, str(error))
                continue
            starts.append(start)
        if not starts:
            return
        jobs = self._sweep_run.launcher.start_all(starts, self._jobs)
        for start, job, begin in zip(starts, jobs, begins, strict=True):
            trial = start.trial
            if isinstance(job, LaunchError):
                self._record.end(trial, journal.FAILED, None, 0.0)
                self._not_begun(trial, str(job))
                continue
            self._record.locate(trial, job.handle, job.host)
            attempt = _Attempt(trial, job, job.host, time.monotonic(), begin, own=True)
            self._running.append(attempt)

    def _not_begun(self, trial: Trial, problem: str) -> None:
        self._failed = True
        self._say(trial, f"failed: {problem}")

    def _pass_on(self) -> None:
        """Send one signal to each trial; leave those that cannot be reached alone."""
        for attempt in list(self._running):
            attempt.job.terminate()
            if not attempt.job.handle:
                self._running.remove(attempt)
                self._say(attempt.trial, f"is still running (its process is unknown); {_RESUME}")
                self._stopped = True

    def _poll(self, attempt: _Attempt) -> list[Trial]:
        """Record a job that ended or moved. Return its trial if it has to start again."""
        trial, job = attempt.trial, attempt.job
        status = job.poll()
        if status is None:
            if job.host != attempt.host:
                attempt.host = job.host
                self._record.locate(trial, job.handle, job.host)
            return []
        self._running.remove(attempt)
        seconds = time.monotonic() - attempt.began
        known, asked = None if status == GONE else status, self._signals.asked
        if status in (0, GONE) and folders.finished(self._sweep_run.folder, trial):
            self._record.end(trial, journal.DONE, known, seconds)
            self._say(trial, f"done in {seconds:.0f} s" if attempt.own else "done")
        elif status == STOPPED or (asked and (status < 0 or status == GONE)):
            self._record.end(trial, journal.PREEMPTED, known, seconds)
            self._say(trial, f"stopped{'' if asked else ' by someone else'}; {_RESUME}")
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
        log = self._sweep_run.log_of(attempt.trial)
        self._say(attempt.trial, f"{ended(status)} after {seconds:.0f} s; the end of {log}:")
        for line in tail(log, attempt.log_begin):
            self._screen.say(f"    | {line}")


def ended(status: int) -> str:
    """A description of the end of a job that left no finished trial."""
    if status == 0:
        return "left no finished run of this trial"
    if status == GONE:
        return "failed with an unknown status"
    if status > 0:
        return f"failed with status {status}"
    memory = " (possibly out of memory)" if -status == signal.SIGKILL else ""
    return f"failed: {signal.Signals(-status).name}{memory}"


def tail(path: Path, begin: int = 0) -> list[str]:
    """The last non-empty lines of a log after byte ``begin``."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _head(log: Path, command: list[str]) -> int:
    """Write the time and command of an attempt to its log; return where its output will begin."""
    start = datetime.now().astimezone().isoformat(timespec="seconds")
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"# {start}  {shlex.join(command)}\n".encode(errors="surrogateescape"))
            return file.tell()


def _age(started: str | None) -> float:
    """Seconds since a time in the journal."""
    if started is None:
        return 0.0
    now = datetime.now().astimezone()
    return max(0.0, (now - datetime.fromisoformat(started)).total_seconds())
