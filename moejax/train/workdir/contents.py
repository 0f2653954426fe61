"""The contents of a workdir: the files a run finds, those it refuses, and those it saved.

``saved.json`` names the checkpoints that were saved, which distinguishes a run that lost them from
one that never had any.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from moejax.config import (
    Config,
    all_differences,
    config_differences,
    flatten,
    from_dict,
    saved,
    settings,
    table_of,
    to_dict,
)
from moejax.config.flags import not_text
from moejax.config.saved import CHECKPOINTS, CONFIG, METRICS, SAVED, TIMINGS, committed_steps
from moejax.config.tree import nested
from moejax.errors import UserError
from moejax.record import files, probe
from moejax.train.metrics.log import warn
from moejax.train.processes import is_first

OUTPUT = "log.txt"
"""The only file that may be in a new workdir: the redirected output of the run itself."""

ASIDE = "before-restart"


@dataclasses.dataclass(frozen=True)
class Contents:
    """The state of a run in its workdir.

    ``config_json`` is empty for a new run. ``changes``: fields with another value than there, which
    they may have, with the old and the new value. ``rebuilt``: config.json was lost, and taken from
    a checkpoint. ``lost``: saved files that are missing.
    """

    config_json: dict[str, Any]
    changes: list[tuple[str, Any, Any]]
    rebuilt: bool = False
    lost: tuple[str, ...] = ()

    @property
    def history(self) -> list[saved.Entry]:
        return list(self.config_json.get("history", ()))

    @property
    def eval_rows(self) -> int | None:
        """``train.eval_rows`` of the run's first start; None for a new run."""
        known = self.config_json
        return saved.first_value(known, "train.eval_rows") if known else None

    @property
    def id(self) -> str:
        return self.config_json.get("id", "")


EMPTY = Contents({}, [])


def check_workdir(
    folder: Path, config: Config, fingerprint: str, restart: bool = False
) -> Contents:
    """Checks a workdir and returns its contents.

    Raises:
      UserError: the folder belongs to something else, to this run with other data, or its saved
        checkpoints are gone; naming the field, the checkpoint or the file.
    """
    if problem := not_text(str(folder)):
        raise UserError(f"--workdir={folder} {problem}; name another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a folder")
    if not (folder / CONFIG).exists() and not saved.holds_run(folder):
        if folder.is_dir() and any(n for n in os.listdir(folder) if n[0] != "." and n != OUTPUT):
            raise UserError(f"--workdir={folder} is not empty and holds no run; name a new folder")
        return EMPTY
    rebuilt = not saved.is_readable(folder)
    known = saved.read_config(folder)
    settings.warn_of_changes(known)
    for name, old, new in config_differences(known["config"], to_dict(config)):
        raise UserError(
            f"{name}={new} but the run in {folder} has {name}={old}; use another --workdir, or "
            "the same value to resume"
        )
    check_text(known, config, fingerprint, "use another --workdir")
    known = {**known, "id": check_identity(folder, known)}
    lost = _check_saved(folder, known, restart)
    changes = [
        change
        for change in all_differences(known["config"], to_dict(config))
        if not change[0].startswith("distributed.")
    ]
    return Contents(known, changes, rebuilt, lost)


def as_started(folder: Path, config: Config) -> Config:
    """The config to resume a run with.

    A run older than a field has the field's ``before`` in its config. If the config has the field's
    default now, the run keeps ``before``, with a line on stderr.

    Raises:
      UserError: config.json cannot be read.
    """
    if not saved.holds_run(folder):
        return config
    known, now = flatten(saved.read_config(folder)["config"]), flatten(to_dict(config))
    kept = {
        name: field.before
        for name, field in table_of(config).items()
        if field.before is not None
        and known.get(name) == field.before
        and now[name] == field.default != field.before
    }
    if not kept:
        return config
    for name, value in kept.items():
        saved.say_once(f"{name}={value}, as the run in {folder} began")
    return from_dict(nested({**now, **kept}))


def check_text(known: dict[str, Any], config: Config, fingerprint: str, remedy: str) -> None:
    """Refuses other tokens than the run's, unless the config names other data.

    Raises:
      UserError: the files of the data have changed.
    """
    if to_dict(config)["data"] == known["config"]["data"] and fingerprint != known["fingerprint"]:
        field = "mixture" if config.data.get("mixture") else "path"
        own = f"data.{field}={config.data[field]!r}" if "path" in config.data else config.task.name
        raise UserError(
            f"the tokens of {own} are not those the run began with; restore the old files or "
            f"{remedy}"
        )


def check_identity(folder: Path, known: dict[str, Any]) -> str:
    """The id of the run in a folder; "" for one of version 0.1.0, which had none.

    Raises:
      UserError: a checkpoint belongs to another run.
    """
    own, where = known.get("id", ""), f"{folder}/{CONFIG}"
    for step, meta in saved.manifest_metas(folder).items():
        theirs = meta.get("run", {}).get("id", "")
        if own and theirs and theirs != own:
            raise UserError(
                f"checkpoint {step} in {folder / CHECKPOINTS} is of run {theirs}, but {where} is "
                f"of run {own}; move that checkpoint away or use another --workdir"
            )
        if theirs and not own:
            own, where = theirs, f"checkpoint {step}"
    return own


# ---------------------------------------------------------------- saved checkpoints


def last_saved(folder: Path, known: dict[str, Any]) -> int:
    """The newest step that a run is known to have saved; 0 if none is."""
    steps = saved.noted_steps(folder)
    return steps[-1] if steps else _surely_saved(folder, known["config"]["train"])


def _surely_saved(folder: Path, train: dict[str, Any]) -> int:
    """The last step that a run without ``saved.json`` has surely saved, from its rows.

    The first save makes the folder of checkpoints, and a save waits for the one before it.
    """
    last = files.last_row(folder / METRICS).get("step", 0)
    every = train["checkpoint_every"]
    if last >= train["steps"] and (folder / "summary.png").exists():
        return last
    begun = (last - 1) // every  # the save of the last row's own step comes after the row
    if (folder / CHECKPOINTS).is_dir():
        return max(0, begun - 1) * every
    return max(0, begun) * every


def missing_checkpoints(folder: Path, known: dict[str, Any]) -> str:
    """A sentence about a run whose newest checkpoint is missing; "" if it is there."""
    step, there = last_saved(folder, known), committed_steps(folder / CHECKPOINTS)
    bad = folder / f"{CHECKPOINTS}_bad"
    damaged = [path.name.partition("-")[0] for path in bad.iterdir()] if bad.is_dir() else []
    if step <= max(there, default=0) or str(step) in damaged:
        return ""
    if there:
        return (
            f"checkpoint {step} is missing from {folder / CHECKPOINTS}, which goes to {there[-1]}"
        )
    last = files.last_row(folder / METRICS).get("step", step)
    return (
        f"{folder / CHECKPOINTS} holds no checkpoint, but the run saved step {step} there and "
        f"logged step {last}"
    )


def _check_saved(folder: Path, known: dict[str, Any], restart: bool) -> tuple[str, ...]:
    """The newest checkpoint, if it is missing and an older one is there.

    Raises:
      UserError: all saved checkpoints are missing; or there are some, and ``restart`` is set.
    """
    there = committed_steps(folder / CHECKPOINTS)
    problem = missing_checkpoints(folder, known)
    if there and restart:
        raise UserError(
            f"--restart: {folder / CHECKPOINTS} holds checkpoint {there[-1]}, from which the run "
            "resumes; leave the flag out, or use another --workdir to start at step 0"
        )
    if problem and there:
        if is_first():
            warn(f"{problem}; resuming from there")
        return (f"{CHECKPOINTS}/{last_saved(folder, known)}",)
    elif problem and not restart:
        raise UserError(
            f"{problem}; put the folder back or mount its disk, or start again at step 0 with "
            "--restart"
        )
    return ()


def note_saved(folder: Path) -> None:
    """Writes the steps of the present checkpoints to ``saved.json``."""
    steps = committed_steps(folder / CHECKPOINTS) if is_first() else []
    if steps:
        files.write_whole(folder / SAVED, json.dumps({"steps": steps}) + "\n")


def set_aside(folder: Path) -> None:
    """Moves the files of an earlier start that has lost its checkpoints to a subfolder."""
    names = (METRICS, TIMINGS, SAVED, "summary.png", "probe")
    left = [folder / name for name in names if (folder / name).exists()]
    if not left or not is_first():
        return
    n = 0
    while (aside := folder / f"{ASIDE}-{n}").exists():
        n += 1
    aside.mkdir()
    if (folder / CONFIG).exists():
        shutil.copy(folder / CONFIG, aside)
    for path in left:
        path.rename(aside / path.name)
    warn(f"the files of the run before this restart are in {aside}")


def missing_probes(folder: Path, recorded: list[int]) -> list[str]:
    """Names of missing probe files, of the steps that were recorded when a checkpoint was saved."""
    there = probe.step_files(folder)
    names = [probe.step_path(folder, step).name for step in recorded if step not in there]
    if recorded and not (probe.folder(folder) / "tokens.npz").exists():
        names.append("tokens.npz")
    return [f"probe/{name}" for name in names]


def make_workdir(folder: Path) -> None:
    """Makes the folder if it is missing.

    Raises:
      UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--workdir={folder} cannot be written to; name another folder")
