"""``moejax sweep status`` and ``--dry-run``: the state of every trial, without changing anything.

States are the journal's, but that a trial is finished is read off its workdir: the journal may be
missing (older sweeps have none), damaged, or behind.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from moejax.errors import UserError
from moejax.sweep import folder as folders
from moejax.sweep import journal, launch, progress
from moejax.sweep.definition import Trial
from moejax.sweep.journal import Entry
from moejax.sweep.progress import Progress
from moejax.train.cost import units

KILLED = "killed"
"""The journal says that it is running, and its process on this machine is gone."""
UNREADABLE = "unreadable"

HEAD = ("trial", "state", "attempts", "host", "time", "step", "loss", "left")
SIDES = "<<><>>>>"


@dataclasses.dataclass(frozen=True)
class Line:
    """A trial as it stands."""

    entry: Entry
    steps: int
    progress: Progress
    seconds: float | None
    """Of the present attempt if it runs, of all attempts else; None if it is not known."""

    @property
    def left(self) -> float | None:
        """Seconds to its end, if it runs."""
        running = self.entry.state == journal.RUNNING
        return self.progress.seconds_left(self.steps) if running else None

    @property
    def cells(self) -> tuple[str, ...]:
        """As `HEAD` names them; - for what is not known."""
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
    """Prints a line for every trial of a sweep, also while it runs.

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
        problems.append(f"without {journal.NAME}, only what the workdirs say is known")
    found = lines(folder, trials, entries)
    print(table(found))
    print(f"\n{summary(found)}")
    for problem in problems:
        print(problem)


def known(folder: Path, trials: Iterable[Trial]) -> tuple[dict[str, Entry], list[str]]:
    """What the journal and the workdirs say about each trial, and what is wrong with them."""
    problems, recorded = [], {}
    try:
        recorded = journal.read(folder)
    except journal.Unreadable as error:
        problems.append(f"{error}; what is finished is read off the workdirs")
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
    """Every trial with the state of its entry and how far its run is."""
    now, found = datetime.now().astimezone(), []
    for trial in trials:
        entry, seconds = entries[trial.name], None
        if entry.state == journal.RUNNING and entry.started:
            seconds = (now - datetime.fromisoformat(entry.started)).total_seconds()
        elif entry.seconds:
            seconds = entry.seconds
        done = progress.read(folders.workdir_of(folder, trial))
        found.append(Line(entry, trial.steps, done, seconds))
    return found


def table(found: Sequence[Line]) -> str:
    """A line per trial, columns side by side."""
    rows = [HEAD, *(line.cells for line in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, SIDES, widths, strict=True)).rstrip()
        for row in rows
    )


def summary(found: Sequence[Line]) -> str:
    """``3 done, 1 running, 8 pending; about 12m00s left``.

    What is left: for trials that run, their steps at their rate; for others the mean time of those
    that are done; shared by as many as run now.
    """
    counts = Counter(line.entry.state for line in found)
    order = [state for state in (*journal.STATES[::-1], KILLED, UNREADABLE) if counts[state]]
    text = ", ".join(f"{counts[state]} {state}" for state in order)
    running = [line.left for line in found if line.entry.state == journal.RUNNING]
    done = [line.seconds for line in found if line.entry.state == journal.DONE and line.seconds]
    waiting = counts[journal.PENDING]
    if not running or None in running or (waiting and not done):
        return text
    mean = sum(done) / len(done) if done else 0.0
    left = (sum(seconds for seconds in running if seconds) + waiting * mean) / len(running)
    return f"{text}; about {duration(left)} left"


def duration(seconds: float | None) -> str:
    """A duration as text; - for None."""
    return "-" if seconds is None else units.duration(seconds)
