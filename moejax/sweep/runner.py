"""The run of a sweep: its trials in separate processes, then its table and picture.

JAX must not be forked and its devices cannot be shared, so trials always run in fresh processes.
The journal records attempts; the workdirs tell which trials are finished; the launcher finds a
trial that outlived a killed runner, and the runner waits for it.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

from moejax.errors import UserError
from moejax.job.launch import check_for_children
from moejax.sweep import budget, journal, launch, status, summary
from moejax.sweep import folder as folders
from moejax.sweep.definition import Sweep, Trial, select
from moejax.sweep.journal import Journal
from moejax.sweep.launch import Launcher
from moejax.sweep.pool import STOPPED, Pool, SweepRun
from moejax.sweep.screen import open_screen
from moejax.sweep.signals import Signals
from moejax.train.workdir.contents import make_workdir
from moejax.train.workdir.lock import WorkdirLock


@dataclasses.dataclass(frozen=True)
class Execution:
    """Options of one execution of a sweep, which do not change its definition."""

    jobs: int | None = None
    """Trials at once; None for the launcher's default."""
    only: str = ""
    """Comma-separated patterns of the names of the trials to run; empty for all."""
    launcher: str = "local"
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The launcher's options."""


def run(sweep: Sweep, folder: Path, execution: Execution | None = None) -> int:
    """Run a sweep in its folder, then write and print the results of all finished trials.

    After a signal it writes them without printing. Returns the exit status: 0 the chosen trials
    are finished, 1 some failed, 75 stopped by a signal.

    Raises:
      UserError: the folder belongs to something else, or an option is invalid. Nothing is written
        then.
    """
    execution = execution or Execution()
    chosen = select(sweep, execution.only)
    folders.check(folder, sweep)
    launcher = launch.make(execution.launcher, folder, execution.options)
    if execution.launcher == "local":
        check_for_children()
    make_workdir(folder)
    with WorkdirLock(folder, alone=True):
        folders.check(folder, sweep)  # once more, now that nobody else writes
        folders.write_index(folder, sweep)
        variants, trials = len(sweep.variants), len(sweep.trials)
        print(f"{sweep.source}: {variants} variants, {trials} trials in {folder}", flush=True)
        budget.announce(sweep, folder, chosen)
        warn(sweep, execution)
        ended = run_trials(sweep, folder, chosen, execution, launcher)
        if ended == STOPPED:
            keep(sweep, folder)
        else:
            report(sweep, folder)
    return ended


def dry_run(sweep: Sweep, folder: Path, execution: Execution) -> None:
    """Print the plan of `run` for each chosen trial. Writes nothing.

    Raises:
      UserError: as `run` does.
    """
    chosen = select(sweep, execution.only)
    folders.check(folder, sweep)
    launch.make(execution.launcher, folder, execution.options)
    entries, problems = status.known(folder, chosen)
    lines = status.lines(folder, chosen, entries)
    print(f"{sweep.source}: {len(chosen)} of {len(sweep.trials)} trials in {folder}")
    print(status.table(lines))
    run = sum(line.entry.state not in (journal.DONE, journal.RUNNING) for line in lines)
    print(f"\n{status.summary(lines)}; {run} would be run")
    budget.announce(sweep, folder, chosen)
    warn(sweep, execution)
    for problem in problems:
        print(problem)


def warn(sweep: Sweep, execution: Execution) -> None:
    """Warn if the step times of trials that share this machine are compared."""
    jobs = execution.jobs or 1
    if sweep.comparison.match == "step_time" and execution.launcher == "local" and jobs > 1:
        print(
            f'warning: MATCH = "step_time" with --jobs={jobs}: times of trials that share a '
            "machine are not comparable; use --jobs=1",
            flush=True,
        )


def report(sweep: Sweep, folder: Path) -> None:
    """Write results.csv, summary.json and sweep.png, and print the table."""
    table = summary.write(sweep, folder)
    if table:
        print(f"\n{table}\n", flush=True)
    picture = "sweep.png, " if table else ""
    print(f"{folder}: results.csv, summary.json, {picture}trials/", flush=True)


def keep(sweep: Sweep, folder: Path) -> None:
    """After a stop: writes what `report` writes if a trial has finished, and prints no table.

    It may be long before the sweep resumes. Files that cannot be read are reported; they are no
    reason for another exit status, since resuming does not need them.
    """
    try:
        if any(folders.finished(folder, trial) for trial in sweep.trials):
            summary.write(sweep, folder)
    except UserError as error:
        print(f"moejax: {folder} has no new summary.json: {error}", file=sys.stderr)


def run_trials(
    sweep: Sweep, folder: Path, chosen: list[Trial], execution: Execution, launcher: Launcher
) -> int:
    """Run the unfinished trials, with a line when each begins and ends.

    Returns 0 if all chosen trials are finished, 1 if some failed, 75 after a signal, which is
    forwarded to the running trials: they save and can be resumed.
    """
    finished = {trial.name: folders.finished(folder, trial) for trial in sweep.trials}
    waiting = [trial for trial in chosen if not finished[trial.name]]
    done = len(chosen) - len(waiting)
    numbers = {
        trial.name: f"[{number}/{len(chosen)}] {trial.name}"
        for number, trial in enumerate(waiting, done + 1)
    }
    sweep_run = SweepRun(
        sweep=sweep,
        folder=folder,
        launcher=launcher,
        launcher_name=execution.launcher,
        command=lambda trial: train_command(trial, sweep, folder),
    )
    with Journal(folder) as record, open_screen(folder, chosen, record) as screen:
        if record.repaired:
            screen.say(
                f"{journal.NAME} was corrupt and has been moved to {journal.DAMAGED}; the new one "
                "is made from the workdirs"
            )
        record.reconcile(sweep.trials, finished)
        if done:
            screen.say(f"{done} of {len(chosen)} trials are already finished")
        with Signals() as signals:
            jobs = execution.jobs or launcher.jobs
            return Pool(sweep_run, jobs, record, screen, signals, numbers).run(waiting)


def train_command(trial: Trial, sweep: Sweep, folder: Path) -> list[str]:
    """The command line of a trial, which can also be run by hand."""
    return [
        sys.executable,
        "-m",
        "moejax",
        "train",
        f"--config={sweep.source}",
        *trial.overrides,
        f"--workdir={folders.workdir_of(folder, trial)}",
    ]
