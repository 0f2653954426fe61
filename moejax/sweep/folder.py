"""The folder of a sweep::

    sweep.json              the trials: name, id, overrides, resolved config
    journal.sqlite          what was tried, where, when, how it ended: see journal.py
    trials/NAME-seedN/      the workdir of one run of ``moejax train``; log.txt is what it said
    results.csv, sweep.png  what came out

Which trials are finished is read off their workdirs, so no record of it can be lost or be wrong.
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
    """Whether the trial has its last evaluation and its picture, which a run draws at its end.

    A run with another config is not the trial's.
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
    """Refuses a folder that holds something else, or another sweep. Writes nothing.

    Trials may be added to a sweep (more seeds, more variants); none may change or go.

    Raises:
      UserError: naming the trial and the field that differ.
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
                "--workdir, or the experiment it was begun with"
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
                "--workdir, or the experiment it was begun with"
            )


def read_trials(folder: Path) -> list[Trial]:
    """The trials of the sweep in the folder, as sweep.json has them.

    Raises:
      UserError: the file is no sweep's.
    """
    path = folder / INDEX
    try:
        index = parsed(path.read_text())
        return [_trial(row, index.get("schema", 0), path) for row in index["trials"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} was not written by `moejax sweep`; restore it or use another --workdir"
        ) from error


def _trial(row: dict[str, Any], schema: int, path: Path) -> Trial:
    """A trial as `write_index` wrote it, by this version or an older one."""
    fields = [field.name for field in dataclasses.fields(Trial)]
    trial = Trial(**{name: row[name] for name in fields if name in row})
    trial = dataclasses.replace(trial, overrides=tuple(trial.overrides), config=dict(trial.config))
    if (trial.name, trial.id) != (row["name"], row["id"]):
        raise ValueError
    return dataclasses.replace(trial, config=migrated(trial.config, schema, str(path))[0])


def write_index(folder: Path, sweep: Sweep) -> None:
    """Writes sweep.json, in one rename. The folder exists."""
    trials = [
        {"name": trial.name, "id": trial.id, **dataclasses.asdict(trial)} for trial in sweep.trials
    ]
    content = (
        json.dumps({"experiment": sweep.source, "schema": SCHEMA, "trials": trials}, indent=1)
        + "\n"
    )
    write_whole(folder / INDEX, content)
