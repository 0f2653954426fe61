"""The folder of a sweep::

    sweep.json              the trials: name, id, overrides, resolved config
    journal.sqlite          attempts, hosts, times and exit statuses: see journal.py
    trials/NAME-seedN/      the workdir of one run of ``moejax train``; log.txt is its output
    results.csv, sweep.png  the results

The workdirs themselves tell which trials are finished, so no other record can get out of step.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from moejax.config import flatten
from moejax.config.saved import METRICS, holds_run, read_config
from moejax.config.versions import SCHEMA, migrated
from moejax.errors import UserError
from moejax.record.files import parsed, read_rows, write_whole
from moejax.sweep.definition import Sweep, Trial, computed, config_id
from moejax.train.workdir.contents import OUTPUT

INDEX = "sweep.json"


def workdir_of(folder: Path, trial: Trial) -> Path:
    return folder / "trials" / trial.name


def log_of(folder: Path, trial: Trial) -> Path:
    return workdir_of(folder, trial) / OUTPUT


def finished(folder: Path, trial: Trial) -> bool:
    """True if the trial has its last evaluation and its picture, which a run draws at its end.

    A run with another config does not count.
    """
    workdir = workdir_of(folder, trial)
    if not all((workdir / name).exists() for name in (METRICS, "summary.png")):
        return False
    if not holds_run(workdir):
        return False
    if config_id(read_config(workdir)["config"]) != trial.id:
        return False
    rows = read_rows(workdir / METRICS)
    return any(row.get("split") == "eval" and row["step"] == trial.steps for row in rows)


def check(folder: Path, sweep: Sweep) -> None:
    """Check that the folder is new or holds this sweep. Writes nothing.

    Trials may be added to a sweep (more seeds, more variants); none may change or disappear.

    Raises:
      UserError: with the trial and the field that differ.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a folder, new or of this sweep")
    if not (folder / INDEX).exists():
        if folder.is_dir() and any(not name.startswith(".") for name in os.listdir(folder)):
            raise UserError(
                f"--workdir={folder} is not empty and holds no sweep; name a new folder"
            )
        return
    new = {trial.name: trial for trial in sweep.trials}
    for old in read_trials(folder):
        if old.name not in new:
            raise UserError(
                f"the sweep in {folder} has a trial {old.name!r}, this one does not; use another "
                "--workdir, or the experiment that the sweep was started with"
            )
        _check_same(f"trial {old.name!r} of the sweep in {folder}", old.config, new[old.name])
    for trial in sweep.trials:
        workdir = workdir_of(folder, trial)
        if holds_run(workdir):
            _check_same(f"the run in {workdir}", read_config(workdir)["config"], trial)


def _check_same(what: str, old: dict[str, Any], trial: Trial) -> None:
    if config_id(old) == trial.id:
        return
    before, after = flatten(computed(old)), flatten(computed(trial.config))
    # The gate's name first, since its other fields follow from it.
    for field in sorted(before | after, key=lambda field: (field != "moe.gate.name", field)):
        then, now = before.get(field), after.get(field)
        if json.dumps(then) != json.dumps(now):  # a tuple comes back as a list
            raise UserError(
                f"{what} has {field}={then}, the experiment now has {field}={now}; use another "
                "--workdir, or the experiment that the sweep was started with"
            )


@dataclasses.dataclass(frozen=True)
class Index:
    """The content of sweep.json."""

    experiment: str
    trials: tuple[Trial, ...]
    """With configs migrated to this version."""
    intact: bool
    """True if every recorded name and id matches its config."""


def read_index(folder: Path) -> Index:
    """The trials that sweep.json records, written by this version or an older one.

    Raises:
      UserError: the folder has no sweep.json, or a file that is not one.
    """
    path = folder / INDEX
    try:
        content = parsed(path.read_text())
        schema = content.get("schema", 0)
        recorded = [(row, _trial(row)) for row in content["trials"]]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {INDEX}; name the folder of a sweep") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} was not written by `moejax sweep`; restore it or name another folder"
        ) from error
    return Index(
        experiment=str(content.get("experiment", "?")),
        trials=tuple(
            dataclasses.replace(trial, config=migrated(trial.config, schema, str(path))[0])
            for _, trial in recorded
        ),
        intact=all((t.name, t.id) == (row["name"], row.get("id")) for row, t in recorded),
    )


def _trial(row: dict[str, Any]) -> Trial:
    """A trial as `write_index` wrote it. The oldest version wrote neither variant nor seed."""
    variant, _, seed = row["name"].rpartition("-seed")
    return Trial(
        variant=row.get("variant", variant),
        seed=int(row.get("seed", seed)),
        overrides=tuple(row.get("overrides", ())),
        config=dict(row["config"]),
    )


def read_trials(folder: Path) -> tuple[Trial, ...]:
    """The trials of a sweep that is to be resumed.

    Raises:
      UserError: sweep.json cannot be read, or a name or an id does not match its config.
    """
    index = read_index(folder)
    if not index.intact:
        raise UserError(
            f"{folder / INDEX} was not written by `moejax sweep`: an id does not match its config; "
            "restore it or use another --workdir"
        )
    return index.trials


def write_index(folder: Path, sweep: Sweep) -> None:
    """Write sweep.json atomically. The folder exists."""
    trials = [
        {"name": trial.name, "id": trial.id, **dataclasses.asdict(trial)} for trial in sweep.trials
    ]
    content = (
        json.dumps({"experiment": sweep.source, "schema": SCHEMA, "trials": trials}, indent=1)
        + "\n"
    )
    write_whole(folder / INDEX, content)
