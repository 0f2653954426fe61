"""What a run may find in its workdir, what is refused there, and what it writes down of itself.

``saved.json`` names the checkpoints that were saved, so that a run that lost them is told from one
that never had any. ``history`` in config.json (and so in every checkpoint) has what has happened to
the run since its first start: fields that changed, rows that are missing, files that were.
"""

import dataclasses
import json
import os
import secrets
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from moejax import __version__
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
from moejax.train.metrics.log import Gap, warn
from moejax.train.processes import is_first

OUTPUT = "log.txt"
"""A file of this name, into which what the run says is sent, may be in the workdir before it."""

ASIDE = "before-restart"
Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a workdir holds of the run.

    ``config_json`` is empty for a new run. ``changes``: fields with another value than there, which
    they may have. ``rebuilt``: config.json was lost, and taken from a checkpoint. ``lost``: what is
    not there, although it was saved.
    """

    config_json: dict[str, Any]
    changes: list[tuple[str, Any, Any]]
    rebuilt: bool = False
    lost: tuple[str, ...] = ()

    @property
    def history(self) -> list[Entry]:
        return list(self.config_json.get("history", ()))

    @property
    def eval_rows(self) -> int | None:
        """``train.eval_rows`` of the run's first start; None for a new run."""
        known = self.config_json
        return saved.first_value(known, "train.eval_rows") if known else None

    @property
    def id(self) -> str:
        return self.config_json.get("id", "")


NOTHING = Found({}, [])


def check_workdir(folder: Path, config: Config, fingerprint: str, restart: bool = False) -> Found:
    """Refuses a workdir that belongs to something else, to this run with other data, or to this run
    without what it has saved.

    Raises:
      UserError: naming the field, the checkpoint or the file that is wrong.
    """
    if problem := not_text(str(folder)):
        raise UserError(f"--workdir={folder} {problem}; name another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; name a folder")
    if not (folder / CONFIG).exists() and not saved.holds_run(folder):
        if folder.is_dir() and any(n for n in os.listdir(folder) if n[0] != "." and n != OUTPUT):
            raise UserError(f"--workdir={folder} is not empty and holds no run; name a new folder")
        return NOTHING
    rebuilt = not saved.is_readable(folder)
    known = saved.read_config(folder)
    settings.say_changes(known)
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
    return Found(known, changes, rebuilt, lost)


def as_begun(folder: Path, config: Config) -> Config:
    """The config for a run that goes on: where it began with what a field was ``before`` there was
    one, and the config has the field's default, it goes on as it began, and says so.

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
        saved.say(f"{name}={value}, as the run in {folder} began")
    return from_dict(nested({**now, **kept}))


def check_text(known: dict[str, Any], config: Config, fingerprint: str, remedy: str) -> None:
    """Refuses other tokens than the run's, unless the config names other data."""
    if to_dict(config)["data"] == known["config"]["data"] and fingerprint != known["fingerprint"]:
        own = f"data.path={config.data.path!r}" if "path" in config.data else config.task.name
        raise UserError(
            f"the tokens of {own} are not those the run began with; restore the old files or "
            f"{remedy}"
        )


def check_identity(folder: Path, known: dict[str, Any]) -> str:
    """The id of the run in a folder; "" for one of version 0.1.0, which had none.

    Raises:
      UserError: a checkpoint is of another run.
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


# ---------------------------------------------------------------- what was saved


def last_saved(folder: Path, known: dict[str, Any]) -> int:
    """The newest step that a run is known to have saved; 0 if none is."""
    steps = saved.noted_steps(folder)
    return steps[-1] if steps else _surely_saved(folder, known["config"]["train"])


def _surely_saved(folder: Path, train: dict[str, Any]) -> int:
    """What follows from the rows of a run that wrote down no saves.

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
    """What to say of a run whose newest checkpoint is not there; "" if it is."""
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
    """Refuses a run without any of the checkpoints it saved; names the newest if that is missing.

    Raises:
      UserError: also for ``restart`` where there are checkpoints.
    """
    there = committed_steps(folder / CHECKPOINTS)
    problem = missing_checkpoints(folder, known)
    if there and restart:
        raise UserError(
            f"--restart: {folder / CHECKPOINTS} holds checkpoint {there[-1]}, from which the run "
            "goes on; leave the flag out, or use another --workdir to start at step 0"
        )
    if problem and there:
        if is_first():
            warn(f"{problem}; going on from there")
        return (f"{CHECKPOINTS}/{last_saved(folder, known)}",)
    elif problem and not restart:
        raise UserError(
            f"{problem}; put the folder back or mount its disk, or start again at step 0 with "
            "--restart"
        )
    return ()


def note_saved(folder: Path) -> None:
    """Writes down which checkpoints there are."""
    steps = committed_steps(folder / CHECKPOINTS) if is_first() else []
    if steps:
        files.write_whole(folder / SAVED, json.dumps({"steps": steps}) + "\n")


def set_aside(folder: Path) -> None:
    """Moves what an earlier life of the run left, without its checkpoints, to a folder below."""
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
    warn(f"what the run left before it is started again is in {aside}")


# ---------------------------------------------------------------- config.json


def new_id() -> str:
    """What a run is known by, whatever its folder is called."""
    return secrets.token_hex(8)


def history(
    found: Found, step: int, gaps: list[Gap], restart: bool, lost: list[str]
) -> list[Entry]:
    """The history of a run that starts at a step: what it was, and what this start adds.

    A run that starts at step 0 has none, whatever an earlier attempt was.
    """
    if step == 0:
        return [stamped(0, {"restarted": True})] if restart and found.config_json else []
    # What happened after the step that the run goes on from holds from there on.
    before = [{**entry, "step": min(entry["step"], step)} for entry in found.history]
    new: list[Entry] = [{"field": name, "old": old, "new": x} for name, old, x in found.changes]
    new += [gap_entry(gap) for gap in gaps]
    new += [{"missing": name} for name in lost]
    return before + [stamped(step, entry) for entry in new]


def gap_entry(gap: Gap) -> Entry:
    """A gap of a log, for the history."""
    return {"log": gap.log, "rows_missing": gap.rows, "rows": gap.of}


def stamped(step: int, entry: Entry) -> Entry:
    """An entry of the history with the step, the time and the version."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"step": step, **entry, "time": now, "version": __version__}


def missing_probes(folder: Path, recorded: list[int]) -> list[str]:
    """Names of the files of the probe that were there when a checkpoint was saved."""
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
