"""A run's files, read with tolerance: missing data are reported, not raised."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config.saved import (
    CHECKPOINTS,
    METRICS,
    TIMINGS,
    committed_steps,
    missing_steps,
    noted_steps,
    read_config,
)
from moejax.errors import UserError
from moejax.record.files import read_valid_rows
from moejax.record.probe import Probe
from moejax.tasks.task import Units
from moejax.train.cost import units

Row = dict[str, Any]

SAVED = (
    "flops", "version", "corpus", "fingerprint", "baselines", "parameters", "visibility", "memory",
    "devices",
)  # fmt: skip
"""The fields that this version writes to config.json beside the config."""

OF_ROW = ("split", "loss")
OF_TIMING = ("seconds_per_step", "elapsed")
"""Without these a row is of no use."""

TABLES = ("moe/load", "moe/dropped", "moe/dropped_by_position", "moe/dropped_by_choice")
"""Numbers by MoE layer and expert, position or choice, in rows that have them."""

LEAK = "leak/nats_per_token"
OF_LEAK = (LEAK, "leak/with_future", "leak/without_future")
BITS = "bits_per_byte"


@dataclasses.dataclass(frozen=True)
class RunData:
    """The files of one run's workdir.

    ``config`` is nested as ``to_dict`` gives it; ``saved`` is all of config.json. ``train`` and
    ``held_out`` are the rows of metrics.jsonl by split, in the order of their steps. ``problems``
    lists in sentences what could not be read. ``leak`` holds the numbers of `moejax eval
    --measure-leak`, where they are known.
    """

    name: str
    workdir: Path
    config: dict[str, Any]
    saved: dict[str, Any]
    train: list[Row]
    held_out: list[Row]
    timings: list[Row]
    probe: Probe | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    leak: dict[str, Any] = dataclasses.field(default_factory=dict)
    bytes_per_token: float = 1.0
    """The divisor of losses that are not recorded per byte: see ``per_byte``."""

    @classmethod
    def read(cls, workdir: str | Path) -> "RunData":
        """Read a workdir, also of a run that is running, was killed or is of another version.

        Raises:
          UserError: the folder does not hold a run.
        """
        folder, problems = Path(workdir), []
        saved = read_config(folder, ("config",))
        missing = [name for name in SAVED if name not in saved]
        if missing:
            problems.append(
                f"config.json has no {', '.join(missing)}: moejax "
                f"{saved.get('version', 'of another version')} wrote it. What needs them is left "
                "out."
            )
        rows = _read_rows(folder / METRICS, OF_ROW, problems)
        timings = _read_rows(folder / TIMINGS, OF_TIMING, problems)
        problems += _gaps(folder, saved, rows, timings)
        if not rows and committed_steps(folder / CHECKPOINTS):
            problems.append(
                "metrics.jsonl has no rows, so the pages that need them are empty. A model that "
                "was not trained here gets them, and its routing, from "
                f"`moejax eval --workdir={folder} --record-probe`."
            )
        measured = [row for row in rows if LEAK in row]
        return cls(
            name=folder.resolve().name,
            workdir=folder,
            config=saved["config"],
            saved=saved,
            train=[row for row in rows if row.get("split") == "train"],
            held_out=[row for row in rows if row.get("split") == "eval"],
            timings=timings,
            probe=_read_probe(folder, problems),
            problems=problems,
            leak=measured[-1] if measured else {},
        )

    def field(self, name: str, otherwise: Any = None) -> Any:
        """A field of the config by its dotted name; ``otherwise`` if this config lacks it."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return otherwise
            value = value[part]
        return value

    def rows(self, split: str) -> list[Row]:
        """The rows of a split, "train" or "eval"."""
        return {"train": self.train, "eval": self.held_out}[split]

    def series(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a number of metrics.jsonl, from the rows that have it."""
        rows = [row for row in self.rows(split) if isinstance(row.get(key), int | float)]
        steps = np.asarray([row["step"] for row in rows], np.int64)
        return steps, np.asarray([row[key] for row in rows], np.float64)

    def arrays(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [N, ...] of an array of metrics.jsonl such as ``moe/load``.

        Rows whose array has another shape than the last one's are left out.
        """
        rows = [(r["step"], np.asarray(r[key])) for r in self.rows(split) if r.get(key)]
        rows = [(step, x) for step, x in rows if x.shape == rows[-1][1].shape]
        steps = np.asarray([step for step, _ in rows], np.int64)
        return steps, np.stack([x for _, x in rows]) if rows else np.zeros((0, 0, 0))

    @property
    def units(self) -> Units:
        """The units of the run's numbers; those of text for runs older than tasks."""
        length = self.field("train.seq_len", 1)
        of = Units("token", units.PER_TOKEN, length, length)._asdict() | self.saved.get("units", {})
        return Units(**of | {"loss": units.loss_unit(self.saved)})

    def per_byte(self) -> "RunData":
        """The same run with every loss in nats per byte of text; unchanged if the task is not text.

        Held-out losses are those of each row. The bytes of training batches are not recorded:
        training losses, baselines and the leak are divided by the bytes per token of the last
        held-out rows, and ``bytes_per_token`` then says so.
        """
        known = [row for row in self.held_out if row.get(BITS) and row["loss"]]
        if self.units.loss != units.PER_TOKEN or not known:
            return self
        factor = known[-1][BITS] * math.log(2) / known[-1]["loss"]
        of_sources = _factors_of_sources(known[-1])
        saved = self.saved | {
            "units": self.units._asdict() | {"loss": units.PER_BYTE},
            "baselines": {n: x * factor for n, x in self.saved.get("baselines", {}).items()},
        }
        of_leak = {key: x * factor for key, x in self.leak.items() if key in OF_LEAK}
        return dataclasses.replace(
            self,
            saved=saved,
            train=[
                row | {"loss": row["loss"] * factor} | _multiplied(row, of_sources)
                for row in self.train
            ],
            held_out=[
                row
                | {"loss": row[BITS] * math.log(2) if row.get(BITS) else math.nan}
                | _multiplied(row, of_sources)
                for row in self.held_out
            ],
            leak=self.leak | of_leak,
            bytes_per_token=1 / factor,
        )

    @property
    def speeds(self) -> str:
        """The key of timings.jsonl that has the speed."""
        return f"{self.units.item}s_per_second"

    @property
    def has_experts(self) -> bool:
        """True if any row of the run has the load of experts."""
        return any(row.get("moe/load") for row in [*self.train, *self.held_out])

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 if none was."""
        return max((row["step"] for row in [*self.train, *self.held_out]), default=0)

    @property
    def finished(self) -> bool:
        """True if the last step of the config has been evaluated."""
        return any(row["step"] == self.field("train.steps") for row in self.held_out)


def _factors_of_sources(row: Row) -> dict[str, float]:
    """Tokens per byte of each source of a mixture, from a held-out row, by the key of its loss."""
    return {
        key: row[bits] * math.log(2) / value
        for key, value in row.items()
        if key.startswith("loss/") and value and row.get(bits := f"{BITS}/{key[5:]}")
    }


def _multiplied(row: Row, factors: Mapping[str, float]) -> Row:
    """The numbers of the row that have a factor, times it; those that it lacks stay away."""
    numbers = {key: row.get(key) for key in factors}
    return {key: x * factors[key] for key, x in numbers.items() if isinstance(x, int | float)}


def _gaps(folder: Path, about: dict[str, Any], rows: list[Row], timings: list[Row]) -> list[str]:
    """Sentences on the steps whose rows are not there, although the run continued after them."""
    last, sentences = max([0, *noted_steps(folder)]), []
    for name, what, field, logged in (
        (METRICS, "training", "train.log_every", [r for r in rows if r.get("split") == "train"]),
        (METRICS, "evaluation", "train.eval_every", [r for r in rows if r.get("split") == "eval"]),
        (TIMINGS, "times", "train.log_every", timings),
    ):
        section, _, leaf = field.partition(".")
        if leaf not in about["config"].get(section, {}):
            continue
        gaps = missing_steps([row["step"] for row in logged], about, field, last)
        if gaps:
            where = ", ".join(f"{first} to {last}" for first, last in gaps[:5])
            more = ", ..." if len(gaps) > 5 else ""
            sentences.append(f"{name} has no rows of {what} for the steps {where}{more}.")
    return sentences


def _read_probe(folder: Path, problems: list[str]) -> Probe | None:
    try:
        probe = Probe.read(folder)
    except UserError as error:
        problems.append(f"{error}.")
        return None
    problems += [f"{problem}." for problem in probe.problems] if probe else []
    return probe


def _fits(row: Row, needs: tuple[str, ...]) -> bool:
    """True if a row has the fields it needs: numbers, tables of numbers and its split."""
    kinds = {name: str if name == "split" else int | float for name in needs}
    if not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
        return False
    try:
        tables = [np.asarray(row[name]) for name in TABLES if name in row]
    except ValueError:  # lists of unequal length
        return False
    return all(not x.size or (x.ndim == 2 and x.dtype.kind in "if") for x in tables)


def _read_rows(path: Path, needs: tuple[str, ...], problems: list[str]) -> list[Row]:
    """The rows of a file of JSON lines; lines that are not JSON are counted among the problems.

    So are rows without the fields in ``needs``.

    The torn last line of a killed run is no problem: the run writes it again when it resumes.
    """
    try:
        rows, bad = read_valid_rows(path, lambda row: _fits(row, needs))
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror}).")
        return []
    if bad:
        lines = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        problems.append(f"{path.name}: {len(bad)} lines are not rows and were skipped ({lines}).")
    return rows
