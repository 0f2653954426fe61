"""Runs a sweep: its trials, some at once, each in a fresh process; then its table and picture.

JAX must not be forked and its devices are not shared, so nothing of a trial happens here. What was
tried is in the journal; what is finished is read off the workdirs; a trial that outlived a killed
runner is found by its launcher and waited for.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

from moejax.errors import UserError
from moejax.job.launch import check_for_children
from moejax.sweep import budget, choose, journal, launch, live, status, summary
from moejax.sweep import folder as folders
from moejax.sweep.definition import Sweep, Trial
from moejax.sweep.journal import Journal
from moejax.sweep.launch import Launcher
from moejax.sweep.pool import STOPPED, Place, Pool
from moejax.sweep.signals import Signals
from moejax.train.workdir.contents import make_workdir
from moejax.train.workdir.lock import WorkdirLock


@dataclasses.dataclass(frozen=True)
class How:
    """How a sweep is run, which does not change what it is."""

    jobs: int | None = None
    """Trials at once; None: as many as the launcher says."""
    only: str = ""
    """Patterns of the names of the trials to run, with commas between; empty: all."""
    launcher: str = "local"
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the launcher."""


def run(sweep: Sweep, folder: Path, how: How | None = None) -> int:
    """Runs a sweep in its folder, then prints and writes what all finished trials gave; after a
    signal it only writes.

    Returns the exit status: 0 the chosen trials are finished, 1 some failed, 75 stopped by a
    signal.

    Raises:
      UserError: the folder belongs to something else, or an option fits nothing: before anything
        is written.
    """
    how = how or How()
    chosen = choose.trials(sweep, how.only)
    folders.check(folder, sweep)
    launcher = launch.make(how.launcher, folder, how.options)
    if how.launcher == "local":
        check_for_children()
    make_workdir(folder)
    with WorkdirLock(folder, alone=True):
        folders.check(folder, sweep)  # once more, now that nobody else writes
        folders.write_index(folder, sweep)
        variants, trials = len(sweep.variants), len(sweep.trials)
        print(f"{sweep.source}: {variants} variants, {trials} trials in {folder}", flush=True)
        budget.announce(sweep, folder, chosen)
        warn(sweep, how)
        ended = run_trials(sweep, folder, chosen, how, launcher)
        if ended == STOPPED:
            keep(sweep, folder)
        else:
            report(sweep, folder)
    return ended


def dry_run(sweep: Sweep, folder: Path, how: How) -> None:
    """Prints what `run` would do with each chosen trial. Writes nothing.

    Raises:
      UserError: as `run` does.
    """
    chosen = choose.trials(sweep, how.only)
    folders.check(folder, sweep)
    launch.make(how.launcher, folder, how.options)
    entries, problems = status.known(folder, chosen)
    found = status.lines(folder, chosen, entries)
    print(f"{sweep.source}: {len(chosen)} of {len(sweep.trials)} trials in {folder}")
    print(status.table(found))
    run = sum(line.entry.state not in (journal.DONE, journal.RUNNING) for line in found)
    print(f"\n{status.summary(found)}; {run} would be run")
    budget.announce(sweep, folder, chosen)
    warn(sweep, how)
    for problem in problems:
        print(problem)


def warn(sweep: Sweep, how: How) -> None:
    """Says a line if times are to be compared that cannot be: of trials that share this machine."""
    if sweep.comparison.match == "step_time" and how.launcher == "local" and (how.jobs or 1) > 1:
        print(
            f'warning: MATCH = "step_time" with --jobs={how.jobs}: times of trials that share a '
            "machine are not comparable; use --jobs=1",
            flush=True,
        )


def report(sweep: Sweep, folder: Path) -> None:
    """Writes results.csv, summary.json and sweep.png, prints the table."""
    table = summary.write(sweep, folder)
    if table:
        print(f"\n{table}\n", flush=True)
    picture = "sweep.png, " if table else ""
    print(f"{folder}: results.csv, summary.json, {picture}trials/", flush=True)


def keep(sweep: Sweep, folder: Path) -> None:
    """After a stop: writes what `report` writes if a trial has finished, and prints no table.

    It may be long before the sweep goes on. Files that cannot be read are said; they are no reason
    for another exit status, since going on does not need them.
    """
    try:
        if any(folders.finished(folder, trial) for trial in sweep.trials):
            summary.write(sweep, folder)
    except UserError as error:
        print(f"moejax: {folder} has no new summary.json: {error}", file=sys.stderr)


def run_trials(
    sweep: Sweep, folder: Path, chosen: list[Trial], how: How, launcher: Launcher
) -> int:
    """Runs what is not finished; says a line when a trial begins and when it ends.

    Returns 0 when all chosen trials are finished, 1 when some failed, 75 after a signal (which the
    running trials get too: they save, and go on next time).
    """
    finished = {trial.name: folders.finished(folder, trial) for trial in sweep.trials}
    waiting = [trial for trial in chosen if not finished[trial.name]]
    done = len(chosen) - len(waiting)
    numbers = {
        trial.name: f"[{number}/{len(chosen)}] {trial.name}"
        for number, trial in enumerate(waiting, done + 1)
    }
    place = Place(
        sweep, folder, launcher, how.launcher, lambda trial: train_command(trial, sweep, folder)
    )
    with Journal(folder) as record, live.screen(folder, chosen, record) as screen:
        if record.mended:
            screen.say(
                f"{journal.NAME} was damaged and is now {journal.DAMAGED}; the new one has what "
                "the workdirs say"
            )
        record.reconcile(sweep.trials, finished)
        if done:
            screen.say(f"{done} of {len(chosen)} trials are finished already")
        with Signals() as signals:
            jobs = how.jobs or launcher.jobs
            return Pool(place, jobs, record, screen, signals, numbers).run(waiting)


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
