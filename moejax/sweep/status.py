"""``moejax sweep status`` and ``--dry-run``: the state of every trial, without changing anything.

States come from the journal, except that the workdir decides whether a trial is finished: the
journal may be missing (older sweeps have none), corrupt or out of date.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from moejax.config.saved import METRICS, TIMINGS
from moejax.errors import UserError
from moejax.record.files import last_row
from moejax.sweep import folder as folders
from moejax.sweep import journal, launch
from moejax.sweep.definition import Trial
from moejax.sweep.journal import Entry
from moejax.train.cost import units

KILLED = "killed"
"""The state of a trial that the journal has as running but whose process is gone."""
UNREADABLE = "unreadable"

HEAD = ("trial", "state", "attempts", "host", "time", "step", "loss", "left")
SIDES = "<<><>>>>"


@dataclasses.dataclass(frozen=True)
class Progress:
    """The last logged numbers of a run; step 0 and None before its first row."""

    step: int = 0
    """Completed updates."""
    loss: float | None = None
    """The last training loss, nats per token."""
    seconds_per_step: float | None = None
    """The mean over the last logged interval that has a time."""

    def seconds_left(self, steps: int) -> float | None:
        """Time to the last step at the current rate, without evaluations; None if unknown."""
        if self.seconds_per_step is None:
            return None
        return max(0, steps - self.step) * self.seconds_per_step


def read_progress(workdir: Path) -> Progress:
    """The progress of a run that may be writing: a file may be missing or cut off."""
    row, train = last_row(workdir / METRICS), last_row(workdir / METRICS, "train")
    timing = last_row(workdir / TIMINGS)
    seconds = float(timing.get("seconds_per_step", math.nan))
    return Progress(
        step=int(row.get("step", 0)),
        loss=float(train["loss"]) if "loss" in train else None,
        seconds_per_step=seconds if math.isfinite(seconds) else None,
    )


@dataclasses.dataclass(frozen=True)
class Line:
    """The current state of a trial."""

    entry: Entry
    steps: int
    progress: Progress
    seconds: float | None
    """Duration of the current attempt if running, otherwise of all attempts; None if unknown."""

    @property
    def left(self) -> float | None:
        """Seconds to its end if it is running."""
        running = self.entry.state == journal.RUNNING
        return self.progress.seconds_left(self.steps) if running else None

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells under `HEAD`; - for an unknown value."""
        entry, loss = self.entry, self.progress.loss
        return (
            entry.name,
            entry.state,
            str(entry.attempts) if entry.attempts else "-",
            entry.host or "-",
            duration(self.seconds),
            f"{self.progress.step}/{self.steps}",
            "-" if loss is None else f"{loss:.4f}",
            duration(self.left),
        )


def show(folder: Path) -> None:
    """Print a line for every trial of a sweep, even while it runs.

    Raises:
      UserError: the folder holds no sweep.
    """
    if not (folder / folders.INDEX).exists():
        raise UserError(
            f"--workdir={folder} holds no sweep ({folders.INDEX} is missing); name the folder that "
            "`moejax sweep` was given"
        )
    trials = folders.read_trials(folder)
    entries, problems = known(folder, trials)
    if not (folder / journal.NAME).exists():
        problems.append(f"there is no {journal.NAME}; states are those of the workdirs")
    progress = lines(folder, trials, entries)
    print(table(progress))
    print(f"\n{summary(progress)}")
    for problem in problems:
        print(problem)


def known(folder: Path, trials: Iterable[Trial]) -> tuple[dict[str, Entry], list[str]]:
    """The journal's entry of each trial, corrected by its workdir, and problems with either."""
    problems, recorded = [], {}
    try:
        recorded = journal.read(folder)
    except journal.Unreadable as error:
        problems.append(f"{error}; the workdirs tell which trials are finished")
    entries = {}
    for trial in trials:
        entry = recorded.get(trial.name) or Entry(trial.id, trial.name)
        try:
            state = _state(folder, trial, entry)
        except UserError as error:
            state = UNREADABLE
            problems.append(str(error))
        entries[trial.name] = dataclasses.replace(entry, state=state)
    return entries, problems


def _state(folder: Path, trial: Trial, entry: Entry) -> str:
    if folders.finished(folder, trial):
        return journal.DONE
    if entry.state == journal.DONE:
        return journal.PENDING
    local = entry.launcher == "local"
    gone = entry.state == journal.RUNNING and local and not launch.may_live(entry.handle)
    return KILLED if gone else entry.state


def lines(folder: Path, trials: Iterable[Trial], entries: Mapping[str, Entry]) -> list[Line]:
    """Every trial with its state and the progress of its run."""
    now, progress = datetime.now().astimezone(), []
    for trial in trials:
        entry, seconds = entries[trial.name], None
        if entry.state == journal.RUNNING and entry.started:
            seconds = (now - datetime.fromisoformat(entry.started)).total_seconds()
        elif entry.seconds:
            seconds = entry.seconds
        done = read_progress(folders.workdir_of(folder, trial))
        progress.append(Line(entry, trial.steps, done, seconds))
    return progress


def table(progress: Sequence[Line]) -> str:
    """A table with a line per trial."""
    rows = [HEAD, *(line.cells for line in progress)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, SIDES, widths, strict=True)).rstrip()
        for row in rows
    )


def summary(progress: Sequence[Line]) -> str:
    """A summary: ``3 done, 1 running, 8 pending; about 12m00s left``.

    The time left counts the remaining steps of running trials at their rates, and the mean time of
    finished trials for each waiting one, divided by the number of running trials.
    """
    counts = Counter(line.entry.state for line in progress)
    order = [state for state in (*journal.STATES[::-1], KILLED, UNREADABLE) if counts[state]]
    text = ", ".join(f"{counts[state]} {state}" for state in order)
    running = [line.left for line in progress if line.entry.state == journal.RUNNING]
    done = [line.seconds for line in progress if line.entry.state == journal.DONE and line.seconds]
    waiting = counts[journal.PENDING]
    if not running or None in running or (waiting and not done):
        return text
    mean = sum(done) / len(done) if done else 0.0
    left = (sum(seconds for seconds in running if seconds) + waiting * mean) / len(running)
    return f"{text}; about {duration(left)} left"


def duration(seconds: float | None) -> str:
    """A duration as text; - for None."""
    return "-" if seconds is None else units.duration(seconds)
