"""What a sweep has written so far: its trials, finished or not, and its comparison."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moejax.analysis.compared import up_to_date
from moejax.analysis.run import RunData
from moejax.config.saved import holds_run
from moejax.errors import UserError
from moejax.sweep.definition import Sweep, Trial
from moejax.sweep.folder import INDEX, log_of, read_index, workdir_of
from moejax.sweep.results import Result, read_diverged, read_trial

TAIL = 15
"""So many last lines of a log say why a trial failed."""


@dataclasses.dataclass(frozen=True)
class TrialData:
    """One trial; ``run`` is None until it has written its config."""

    trial: Trial
    run: RunData | None
    log: str
    """The last lines of its output."""

    @property
    def name(self) -> str:
        return self.trial.name

    @property
    def variant(self) -> str:
        return self.trial.variant

    @property
    def seed(self) -> int:
        return self.trial.seed

    @property
    def finished(self) -> bool:
        return self.run is not None and self.run.finished

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        if self.run is None or not self.run.last_step:
            return "no step logged" if self.log else "not started"
        return f"stopped or going on, step {self.run.last_step} of {self.run.field('train.steps')}"


@dataclasses.dataclass(frozen=True)
class SweepData:
    """A sweep's folder: ``results`` in numbers, a finished trial each.

    ``summary`` is that of summary.json (docs/sweeps.md), or made anew of ``results`` if there is
    none or it has other trials; ``stale`` then says which, in a sentence.
    """

    name: str
    folder: Path
    experiment: str
    trials: list[TrialData]
    summary: dict[str, Any]
    stale: str
    results: list[Result]
    problems: list[str]

    @classmethod
    def read(cls, folder: str | Path) -> "SweepData":
        """Reads a sweep that is finished, going on, or has nothing but failures.

        Raises:
          UserError: the folder holds no sweep.
        """
        folder, problems = Path(folder), []
        index = read_index(folder)
        if not index.trials:
            raise UserError(f"{folder / INDEX} has no trials; restore it or name another folder")
        trials = [_trial(folder, trial, problems) for trial in index.trials]
        sweep = Sweep(index.experiment, index.trials)
        results, diverged = _results(folder, trials, problems), _diverged(folder, sweep, trials)
        summary, stale = up_to_date(folder, sweep, results, diverged, problems)
        return cls(
            name=folder.resolve().name,
            folder=folder,
            experiment=sweep.source,
            trials=trials,
            summary=summary,
            stale=stale,
            results=results,
            problems=problems,
        )

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(trial.variant for trial in self.trials))

    def runs(self, variant: str) -> list[RunData]:
        """The finished runs of a variant."""
        of = [trial for trial in self.trials if trial.variant == variant and trial.finished]
        return [trial.run for trial in of if trial.run is not None]


def _trial(folder: Path, trial: Trial, problems: list[str]) -> TrialData:
    workdir, run = workdir_of(folder, trial), None
    if holds_run(workdir):
        try:
            run = RunData.read(workdir).per_byte()  # as the comparison is
        except UserError as error:
            problems.append(f"{trial.name}: {error}.")
    log = log_of(folder, trial)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return TrialData(trial, run, "\n".join(lines[-TAIL:]))


def _diverged(folder: Path, sweep: Sweep, trials: Iterable[TrialData]) -> set[tuple[str, int]]:
    """Variant and seed of trials that ended at a value that was not finite."""
    found = set()
    for trial in trials:
        if not trial.finished:
            alone = dataclasses.replace(sweep, trials=(trial.trial,))
            try:
                found |= read_diverged(folder, alone)
            except UserError:
                pass  # a damaged file, which is among the problems of the sweep or of its run
    return found


def _results(folder: Path, trials: Iterable[TrialData], problems: list[str]) -> list[Result]:
    found = []
    for trial in trials:
        if trial.finished:
            try:
                found.append(read_trial(folder, trial.trial))
            except (UserError, OSError) as error:
                problems.append(f"{trial.name} is not in the comparison: {error}.")
            except KeyError as error:
                problems.append(f"{trial.name} is not in the comparison: it has no {error}.")
    return found
