"""Runs trials one after the other, each in a fresh process of ``moejax train``.

JAX must not be forked and its devices are not shared, so nothing of a trial happens here. A trial's
output goes to its log; the log file is locked by this process and, through its inherited output, by
the trial: the lock ends when the trial does, also when the runner was killed before it.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from moejax.sweep import budget, summary
from moejax.sweep import folder as folders
from moejax.sweep.definition import Sweep, Trial, changed
from moejax.train.lock import WorkdirLock
from moejax.train.loop import make_workdir

DONE, FAILED, STOPPED = 0, 1, 75

_TAIL_LINES = 15
_TAIL_BYTES = 20_000


def run(sweep: Sweep, folder: Path) -> int:
    """Runs a sweep in its folder, then prints and writes what all finished trials gave.

    Returns the exit status: 0 all trials are finished, 1 some failed, 75 stopped by a signal.

    Raises:
      UserError: the folder belongs to something else, before anything is written.
    """
    folders.check(folder, sweep)
    make_workdir(folder)
    with WorkdirLock(folder, alone=True):
        folders.check(folder, sweep)  # once more, now that nobody else writes
        folders.write_index(folder, sweep)
        variants, trials = len(sweep.variants), len(sweep.trials)
        _say(f"{sweep.source}: {variants} variants, {trials} trials in {folder}")
        budget.announce(sweep, folder)
        status = run_trials(sweep, folder)
        if status != STOPPED:
            report(sweep, folder)
    return status


def report(sweep: Sweep, folder: Path) -> None:
    """Writes results.csv, summary.json and sweep.png, prints the table."""
    table = summary.write(sweep, folder)
    if table:
        _say(f"\n{table}\n")
    _say(f"{folder}: results.csv, summary.json, {'sweep.png, ' if table else ''}trials/")


def run_trials(sweep: Sweep, folder: Path) -> int:
    """Runs what is not finished; says a line when a trial begins and when it ends.

    Returns 0 when all trials are finished, 1 when some failed, 75 after a signal (which the running
    trial gets too: it saves, and goes on next time).
    """
    waiting = [trial for trial in sweep.trials if not folders.finished(folder, trial)]
    done = len(sweep.trials) - len(waiting)
    if done:
        _say(f"{done} of {len(sweep.trials)} trials are finished already")
    failed = stopped = False
    with _Signals() as signals:
        for number, trial in enumerate(waiting, done + 1):
            place = f"[{number}/{len(sweep.trials)}] {trial.name}"
            status = _run(trial, sweep, folder, signals, place)
            if signals.asked and status != DONE:
                _say(f"{place} stopped; the same command goes on with the sweep")
                return STOPPED
            failed |= status == FAILED
            stopped |= status == STOPPED  # by someone else than this runner
            if signals.asked and number < len(sweep.trials):
                _say("stopped between two trials; the same command goes on with the sweep")
                return STOPPED
    return FAILED if failed else STOPPED if stopped else DONE


def _run(trial: Trial, sweep: Sweep, folder: Path, signals: "_Signals", place: str) -> int:
    """One trial, waited for. Done is what left a whole run, not what exits with 0."""
    path = folders.log_of(folder, trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as log:
        if not _lock(log, signals, place):
            return STOPPED
        if folders.finished(folder, trial):  # by the process that was waited for
            _say(f"{place} done")
            return DONE
        problem = changed(sweep, trial)
        if problem:
            _say(f"{place} failed: {problem}")
            return FAILED
        _say(f"{place} ...")
        command = train_command(trial, sweep, folder)
        start = datetime.now().astimezone().isoformat(timespec="seconds")
        log.write(f"# {start}  {shlex.join(command)}\n".encode())
        log.flush()
        began, begin = time.monotonic(), log.tell()
        status = signals.wait_for(_start(command, log))
    took = f"{time.monotonic() - began:.0f} s"
    if status == 0 and folders.finished(folder, trial):
        _say(f"{place} done in {took}")
        return DONE
    if status == STOPPED or (signals.asked and status < 0):
        return STOPPED
    how = f"failed with status {status}" if status else "left no finished run of this trial"
    _say(f"{place} {how} after {took}; the end of {path}:")
    for line in tail(path, begin):
        _say(f"    | {line}")
    return FAILED


def train_command(trial: Trial, sweep: Sweep, folder: Path) -> list[str]:
    """The command line of a trial; by hand it does the same."""
    return [
        sys.executable,
        "-m",
        "moejax",
        "train",
        f"--config={sweep.source}",
        *trial.overrides,
        f"--workdir={folders.workdir_of(folder, trial)}",
    ]


def tail(path: Path, begin: int = 0) -> list[str]:
    """The last lines of a log from byte ``begin`` on, without empty ones."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _start(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Its own session: Ctrl-C on the terminal reaches the runner alone, which passes it on once."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _lock(log: IO[bytes], signals: "_Signals", place: str) -> bool:
    """Takes the log; waits while a trial that outlived its runner has it. False when signalled."""
    said = False
    while not signals.asked:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not said:
                _say(f"{place} is still running, begun by a runner that was killed; waiting for it")
            said = True
            time.sleep(0.5)
    return False


class _Signals:
    """While entered, Ctrl-C and SIGTERM stop the running trial, which saves, and then the sweep."""

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait_for(self, child: subprocess.Popen[bytes]) -> int:
        """The exit status of a process that gets the signals too."""
        self._child = child
        if self.asked:  # it came while the process was being made
            child.terminate()
        status = child.wait()
        self._child = None
        return status

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        self.asked = True
        if self._child:
            self._child.terminate()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"moejax: stopping the trial, which saves; once more to abort it at once\n")


def _say(line: str) -> None:
    print(line, flush=True)
