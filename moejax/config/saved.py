"""The only reader and the only writer of config.json, and the names of a run's other files.

Every checkpoint holds the whole of config.json as well, so that either can be read without the
other.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.config.versions import SCHEMA, is_newer, migrated, misfit
from moejax.errors import UserError
from moejax.record import files

CONFIG, METRICS, TIMINGS = "config.json", "metrics.jsonl", "timings.jsonl"
CHECKPOINTS, SAVED = "checkpoints", "saved.json"

RUN = ("config", "fingerprint", "baselines")
"""The entries of config.json that resuming needs."""

Entry = dict[str, Any]
"""An entry of a run's history."""

_TYPES: dict[str, type] = {
    "id": str,
    "fingerprint": str,
    "version": str,
    "commit": str,
    "source": str,
    "command": str,
    "corpus": str,
    "visibility": str,
    "encoding": str,
    **dict.fromkeys(("baselines", "units", "environment", "parameters", "flops", "memory"), dict),
    **dict.fromkeys(("devices", "text", "evaluated", "mixture"), dict),
    **dict.fromkeys(("history", "overrides"), list),
}
"""Types of the entries that config.json may hold besides the config. ``commit`` may be null."""

_NUMBERS = ("baselines", "parameters", "flops", "memory")
_UNITS = {"item": str, "loss": str, "tokens_per_row": int, "items_per_row": int}

_printed: set[str] = set()


def read_config(workdir: Path, needs: tuple[str, ...] = RUN) -> dict[str, Any]:
    """The workdir's config.json, or a file like it; its config with the fields of this version.

    If it cannot be read, the copy in the newest checkpoint is returned, with a line on stderr.

    Raises:
      UserError: there is neither, an entry in ``needs`` is missing, or a newer version wrote it.
    """
    is_file = workdir.suffix == ".json" and not workdir.is_dir()
    path = workdir if is_file else workdir / CONFIG
    try:
        saved = _read(path, needs)
    except UserError:
        copy = _from_checkpoint(path.parent) if path.name == CONFIG else None
        if copy is None:
            raise
        step, saved = copy
        say_once(f"{path} is missing or damaged; it is taken from checkpoint {step}")
    return of_this_version(saved, str(path))


def of_this_version(saved: dict[str, Any], origin: str) -> dict[str, Any]:
    """The saved content, its config with the fields of this version.

    Raises:
      UserError: a newer version wrote it.
    """
    schema = saved.get("schema", 0)
    config, added = migrated(saved["config"], schema, origin)
    if added and schema == SCHEMA:
        values = _values(config, added)
        say_once(f"{origin} lacks fields, for which this is used: {values}")
    return {**saved, "schema": SCHEMA, "config": config}


def _values(config: dict[str, Any], names: list[str]) -> str:
    """The fields as text: ``a.b=1, a.c=2``."""
    shown = []
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = value[part]
        shown.append(f"{name}={value}")
    return ", ".join(shown)


def write_config(folder: Path, content: dict[str, Any]) -> None:
    """Writes config.json atomically."""
    files.write_json(folder / CONFIG, content)


def is_readable(folder: Path) -> bool:
    """True if config.json is there and intact."""
    try:
        _read(folder / CONFIG, RUN)
    except UserError:
        return False
    return True


def holds_run(folder: Path) -> bool:
    """True if a folder has a config.json, or a checkpoint to take it from."""
    return (folder / CONFIG).is_file() or _from_checkpoint(folder) is not None


def committed_steps(directory: Path) -> list[int]:
    """Steps in a checkpoint directory, ascending. A step's folder gets its name when it commits."""
    if not directory.is_dir():
        return []
    folders = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in folders if name.isdecimal())


def read_manifest(directory: Path, step: int) -> dict[str, Any] | None:
    """The manifest of a checkpoint, if it is there and whole."""
    try:
        return files.unsealed(files.parsed((directory / str(step) / "meta/metadata").read_bytes()))
    except (OSError, ValueError):
        return None


def manifest_metas(folder: Path) -> dict[int, dict[str, Any]]:
    """The meta that each checkpoint of a workdir was saved with, by step, the newest first."""
    directory, metas = folder / CHECKPOINTS, {}
    for step in reversed(committed_steps(directory)):
        manifest = read_manifest(directory, step)
        if manifest is not None and isinstance(manifest.get("meta"), dict):
            metas[step] = manifest["meta"]
    return metas


# ---------------------------------------------------------------- history


def noted_steps(folder: Path) -> list[int]:
    """The checkpoints that a run has recorded, ascending; empty if it recorded none."""
    try:
        return sorted(map(int, files.parsed((folder / SAVED).read_bytes())["steps"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return []


def entry_text(entry: Entry) -> str:
    """A line of text for an entry of the history."""
    if "field" in entry:
        return f"step {entry['step']}: {entry['field']} from {entry['old']} to {entry['new']}"
    if "log" in entry:
        lost = entry["rows_missing"]
        what = f"{lost} of {entry['rows']} rows are missing" if lost else "rows were altered"
        return f"up to step {entry['step']}: {what} in {entry['log']}"
    if "missing" in entry:
        return f"step {entry['step']}: {entry['missing']} was missing"
    return "restarted at step 0, after its checkpoints were lost"


def steps_per_row(steps: Sequence[int], known: dict[str, Any], field: str) -> list[int]:
    """The number of steps that each logged row represents: those since the row before it.

    Fewer where rows between the two are missing.

    ``field``: the interval of the rows, ``train.log_every`` or ``train.eval_every``.
    """
    before = [0, *steps]
    return [
        min(step - since, _largest(known, field, since, step))
        for since, step in zip(before, steps, strict=False)
    ]


def missing_steps(
    steps: Sequence[int], known: dict[str, Any], field: str, upto: int
) -> list[tuple[int, int]]:
    """The ranges of steps, first and last, that no row represents, until the step ``upto``.

    See `steps_per_row`.
    """
    ranges, since = [], 0
    for step, own in zip(steps, steps_per_row(steps, known, field), strict=True):
        if step - since > own:
            ranges.append((since + 1, step - own))
        since = step
    if upto - since >= _largest(known, field, since, upto):
        ranges.append((since + 1, upto))
    return ranges


def first_value(known: dict[str, Any], field: str) -> Any:
    """The value of a field at the run's first start."""
    changes = [entry for entry in known.get("history", ()) if entry.get("field") == field]
    section, _, leaf = field.partition(".")
    return changes[0]["old"] if changes else known["config"][section][leaf]


def _largest(known: dict[str, Any], field: str, after: int, until: int) -> int:
    """The largest value that a field had in the steps after one until another."""
    changes = [entry for entry in known.get("history", ()) if entry.get("field") == field]
    values = [first_value(known, field), *(entry["new"] for entry in changes)]
    begins = [0, *(entry["step"] for entry in changes)]
    ends = [*begins[1:], max(until, begins[-1]) + 1]
    held = [
        value
        for value, begin, end in zip(values, begins, ends, strict=True)
        if begin < until and end > after and end > begin
    ]
    return max(held, default=values[-1])


# ---------------------------------------------------------------- reading


def _read(path: Path, needs: tuple[str, ...]) -> dict[str, Any]:
    try:
        saved = files.parsed(path.read_bytes())
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path} {what}: is {path.parent} the workdir of a run?") from None
    except ValueError as error:  # or bytes that are not text
        raise UserError(
            f"{path} is not valid JSON ({error}); restore it or use another --workdir"
        ) from error
    newer = isinstance(saved, dict) and is_newer(saved.get("schema", 0))  # may lack anything
    known = isinstance(saved, dict) and (newer or {*needs} <= saved.keys())
    if not known or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path} was not written by `moejax train`; use another --workdir")
    if not newer and (problem := _misshapen(saved)):
        raise UserError(f"{path}: {problem}; restore it or use another --workdir")
    return saved


def _misshapen(saved: dict[str, Any]) -> str:
    """A sentence about the first value in config.json that no run writes; "" if there is none."""
    for name, kind in _TYPES.items():
        unknown = name == "commit" and saved.get(name) is None  # a run without git
        if name in saved and not unknown and not isinstance(saved[name], kind):
            return f"{name}={json.dumps(saved[name])[:80]} must be of type {kind.__name__}"
    for name in _NUMBERS:
        if not _are_numbers(saved.get(name, {})):
            return f"{name}={json.dumps(saved[name])[:80]} must hold numbers"
    units = saved.get("units", {})
    if any(type(units[name]) is not kind for name, kind in _UNITS.items() if name in units):
        return f"units={json.dumps(units)[:80]} holds a value that no run writes"
    for entry in saved.get("history", ()):
        if not (isinstance(entry, dict) and type(entry.get("step")) is int and _is_entry(entry)):
            return f"history has {json.dumps(entry)[:80]}, which no run writes"
    return misfit(saved["config"])


def _are_numbers(value: Any) -> bool:
    """True if a value is a number, or a nested mapping of numbers."""
    if isinstance(value, dict):
        return all(map(_are_numbers, value.values()))
    return type(value) in (int, float)


def _is_entry(entry: dict[str, Any]) -> bool:
    """True if an entry of the history is of a kind that `entry_text` knows, with all its keys."""
    kinds = ({"field", "old", "new"}, {"log", "rows_missing", "rows"}, {"missing"}, {"restarted"})
    return any(kind <= entry.keys() for kind in kinds)


def _from_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    for step, meta in manifest_metas(folder).items():
        if isinstance(meta.get("run"), dict):
            return step, meta["run"]
    return None


def say_once(line: str) -> None:
    """Prints a line on stderr, once per process: several readers may read the same file."""
    if line not in _printed:
        _printed.add(line)
        print(f"moejax: {line}", file=sys.stderr, flush=True)
