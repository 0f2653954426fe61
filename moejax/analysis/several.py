"""Several runs, or several sweeps, prepared for a comparison.

Runs cannot be compared with sweeps, nor across tasks or units of loss. Runs on different data are
shown, but no difference of their losses is computed.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.errors import UserError
from moejax.train.cost.units import PER_TOKEN

MOST = 8
"""The number of colours."""


@dataclasses.dataclass(frozen=True)
class Several:
    """Runs or sweeps of one kind, with names that differ; losses are in ``unit``."""

    names: tuple[str, ...]
    members: tuple[RunData, ...] | tuple[SweepData, ...]
    unit: str
    same_data: bool

    @property
    def runs(self) -> dict[str, RunData]:
        """The runs by name; empty for sweeps."""
        return {
            name: each
            for name, each in zip(self.names, self.members, strict=True)
            if isinstance(each, RunData)
        }

    @property
    def sweeps(self) -> dict[str, SweepData]:
        """The sweeps by name; empty for runs."""
        return {
            name: each
            for name, each in zip(self.names, self.members, strict=True)
            if isinstance(each, SweepData)
        }


def beside(data: Sequence[RunData | SweepData]) -> Several:
    """Prepare the runs or sweeps of several folders for a comparison.

    Raises:
      UserError: they cannot be compared, or they are too many.
    """
    if len(data) > MOST:
        raise UserError(f"{len(data)} folders are too many to compare; name at most {MOST}")
    folders = [_folder(each) for each in data]
    for place, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:place]}:
            raise UserError(f"{folder} is named twice; name different folders to compare them")
    runs = [each for each in data if isinstance(each, RunData)]
    if len(runs) not in (0, len(data)):
        run = runs[0].workdir
        sweep = next(each.folder for each in data if isinstance(each, SweepData))
        raise UserError(
            f"{run} is a run and {sweep} is a sweep, which cannot be compared; name one of the "
            f"sweep's trials, below {sweep}/trials/, or two sweeps"
        )
    samples = [_samples(each) for each in data]
    for folder, sample in zip(folders, samples, strict=True):
        if not sample:
            raise UserError(f"{folder} has no trial that has started: there is nothing to compare")
    _check_tasks(folders, samples)
    if runs:
        shown = tuple(_in_one_unit(runs))
        unit = _one_unit(folders, [run.units.loss for run in shown])
        named: tuple[RunData, ...] | tuple[SweepData, ...] = shown
    else:
        named = tuple(each for each in data if isinstance(each, SweepData))
        unit = _one_unit(folders, [each.summary.get("unit", "?") for each in named])
    prints = [{str(run.saved.get("fingerprint")) for run in sample} for sample in samples]
    return Several(_names(folders), named, unit, len(set.union(*prints)) == 1)


def _folder(each: RunData | SweepData) -> Path:
    return each.workdir if isinstance(each, RunData) else each.folder


def _samples(each: RunData | SweepData) -> list[RunData]:
    """The run itself, or the runs of all trials that have started."""
    if isinstance(each, RunData):
        return [each]
    return [trial.run for trial in each.trials if trial.run]


def _check_tasks(folders: Sequence[Path], samples: Sequence[list[RunData]]) -> None:
    tasks = [str(of_it[0].field("task.name", "language")) for of_it in samples]
    for folder, task in zip(folders, tasks, strict=True):
        if task != tasks[0]:
            raise UserError(
                f"{folders[0]} has task.name={tasks[0]!r} and {folder} has task.name={task!r}: "
                "their losses are of different things and cannot be compared"
            )


def _in_one_unit(runs: Sequence[RunData]) -> Sequence[RunData]:
    """The runs unchanged if their tokens are the same, otherwise with losses per byte.

    Raises:
      UserError: losses per token of different tokens, whose bytes are unknown.
    """
    tokens = {
        (run.units.loss, run.field("data.tokenizer"), run.saved.get("heldout_bytes_per_token"))
        for run in runs
    }
    if len(tokens) == 1:
        return runs
    shown = [run.per_byte() for run in runs]
    for run in shown:
        if run.units.loss == PER_TOKEN:
            raise UserError(
                f"the losses of {run.workdir} are in {PER_TOKEN} of tokens that the others do not "
                "have, and none of its evaluations has bits per byte: they cannot be compared"
            )
    return shown


def _one_unit(folders: Sequence[Path], units: Sequence[str]) -> str:
    for folder, unit in zip(folders, units, strict=True):
        if unit != units[0]:
            raise UserError(
                f"the losses of {folders[0]} are in {units[0]} and those of {folder} in {unit}, "
                "and not known in one unit: they cannot be compared"
            )
    return units[0]


def _names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders' names, with as many parents as needed to make them distinct."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(map(str, folders))
