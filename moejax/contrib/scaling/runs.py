"""The runs of a fit, from a table of published curves or from the folder of a sweep.

A curves table is a CSV file, or one compressed with gzip, in the layout of
github.com/google-deepmind/scaling_laws_for_routing (data/curves.csv.gz, CC-BY 4.0): a row per
evaluation of a run. The last evaluation of a run counts, and only runs that the law describes: one
expert per token (k = 1), every other block routed, feed-forward layers of the usual width.
"""

import csv
import dataclasses
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.sweep.folder import read_index

DENSE = "Dense"
"""The router of a model without experts. Its runs are the E = 1 of every router."""

CURVES = (
    "hyper_id", "step", "loss_validation", "num_experts", "k", "router_type", "seed",
    "routing_frequency", "flop_increase", "dense_parameter_count",
)  # fmt: skip
RESULTS = ("variant", "seed", "finished", "loss", "total_parameters")
_WHOLE_RUN = 0.99
_SAME_SIZE = 0.05


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model. ``size`` is N, the parameters of the model with one expert per layer."""

    router: str
    size: float
    experts: int
    seed: int
    loss: float
    name: str = ""

    @property
    def cell(self) -> tuple[float, int]:
        return self.size, self.experts


@dataclasses.dataclass(frozen=True)
class Source:
    """Runs, the unit of their loss, and notes on their selection."""

    name: str
    runs: tuple[Run, ...]
    unit: str
    notes: tuple[str, ...] = ()
    published: bool = False
    """True if the runs come from a table of Clark et al., with their names of routers."""

    @property
    def routers(self) -> list[str]:
        return [r for r in dict.fromkeys(run.router for run in self.runs) if r != DENSE]

    def of(self, router: str) -> list[Run]:
        """A router's runs and the dense ones it can be fitted with.

        A dense run within 5 % of one of the router's sizes is taken as that size, at E = 1. Others
        count where the router has several sizes, so that N is a term of the law, and not where it
        has one.
        """
        own = [run for run in self.runs if run.router == router]
        sizes = {run.size for run in own}
        dense = []
        for run in (run for run in self.runs if run.router == DENSE):
            near = min(sizes, key=lambda size: abs(run.size / size - 1))
            if abs(run.size / near - 1) <= _SAME_SIZE:
                dense.append(dataclasses.replace(run, size=near))
            elif len(sizes) > 1:
                dense.append(run)
        return dense + own


def read_source(path: str) -> Source:
    """The runs of a curves table, or of a sweep's folder.

    Raises:
      UserError: there is no such file, it is of neither kind, lacks a column, or has a value that
        is not a number.
    """
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return _read_sweep(place)
    if not place.exists():
        raise UserError(
            f"{path} does not exist; name a table of curves (.csv or .csv.gz) or a sweep's folder"
        )
    return _read_curves(place)


def _read_curves(path: Path) -> Source:
    last: dict[str, dict[str, str]] = {}
    for row in _read_table(path, CURVES):
        if row["loss_validation"]:  # some evaluations have none
            known = last.get(row["hyper_id"])
            if known is None or _number(path, row, "step") > _number(path, known, "step"):
                last[row["hyper_id"]] = row
    longest = max((_number(path, row, "step") for row in last.values()), default=0.0)
    runs = []
    for row in last.values():
        values = {name: _number(path, row, name) for name in CURVES if name != "router_type"}
        if (values["k"], values["routing_frequency"], values["flop_increase"]) != (1, 0.5, 1):
            continue
        if values["step"] < _WHOLE_RUN * longest:
            raise UserError(
                f"{path}: run hyper_id={row['hyper_id']} ends at step {row['step']}, others at "
                f"{longest:.0f}; remove its rows or add its last ones"
            )
        size = _positive(path, row, "dense_parameter_count")
        loss = _positive(path, row, "loss_validation")
        experts, seed = _positive(path, row, "num_experts"), int(values["seed"])
        name = f"hyper_id={row['hyper_id']}"
        if experts != int(experts):
            raise UserError(f"{path}: num_experts={experts} of {name} must be a whole number")
        runs.append(Run(row["router_type"], size, int(experts), seed, loss, name))
    note = (
        f"{len(runs)} of {len(last)} runs count: one expert per token, every other block routed; "
        "of each the last evaluation"
    )
    return Source(path.name, tuple(runs), "nats/token", (note,), published=True)


def _read_sweep(folder: Path) -> Source:
    index = {trial.name: trial.config for trial in read_index(folder).trials}
    runs, left = [], 0
    for row in _read_table(folder / "results.csv", RESULTS):
        name = f"{row['variant']}-seed{row['seed']}"
        if row["finished"] != "1":
            left += 1
            continue
        if name not in index:
            raise UserError(f"{folder}/results.csv has a trial {name!r} that sweep.json lacks")
        runs.append((_run_of(folder, row, index[name]), _family(index[name]), row["variant"]))
    _check_one_variant(folder, runs)
    smallest: dict[str, float] = {}
    for run, family, _ in runs:
        smallest[family] = min(run.size, smallest.get(family, math.inf))
    kept = [dataclasses.replace(run, size=smallest[family]) for run, family, _ in runs]
    notes = [f"{len(kept)} finished trials"]
    if left:
        notes.append(f"{left} trials are not finished and left out")
    return Source(folder.name or str(folder), tuple(kept), "nats/byte", tuple(notes))


def _run_of(folder: Path, row: dict[str, str], config: dict[str, Any]) -> Run:
    """A trial, with the parameters of one routed expert per layer instead of all.

    The router's own are still among them.
    """
    path, model, moe = folder / "results.csv", config["model"], config["moe"]
    total = _positive(path, row, "total_parameters")
    loss, seed = _positive(path, row, "loss"), int(_number(path, row, "seed"))
    name = f"{row['variant']}-seed{row['seed']}"
    if not moe["every"]:
        return Run(DENSE, total, 1, seed, loss, name)
    matrices = 3 if moe["activation"] == "swiglu" else 2
    layers = (model["num_layers"] - moe["first_dense"]) // moe["every"]
    expert = matrices * model["d_model"] * moe["d_ff"]
    k = moe["gate"].get("k", 1)
    router = moe["gate"]["name"] + ("" if k == 1 else f" k={k}")
    size = total - layers * (moe["num_experts"] - 1) * expert
    return Run(router, size, moe["num_experts"], seed, loss, name)


def _family(config: dict[str, Any]) -> str:
    """A key shared by models that differ only in router and number of experts.

    They get one size, that of the model with the fewest router parameters.
    """
    moe = config["moe"]
    names = ("d_ff", "every", "first_dense", "shared_experts", "activation") if moe["every"] else ()
    return json.dumps([config["model"], {name: moe[name] for name in names}], sort_keys=True)


def _check_one_variant(folder: Path, runs: Iterable[tuple[Run, str, str]]) -> None:
    """Raise for two variants with the same router, model and number of experts."""
    variants: dict[tuple[str, str, int], str] = {}
    for run, family, variant in runs:
        other = variants.setdefault((run.router, family, run.experts), variant)
        if other != variant:
            raise UserError(
                f"{folder}: variants {other!r} and {variant!r} are both {run.router} with "
                f"E={run.experts} and one model; the law needs a sweep that changes nothing else"
            )


def _read_table(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that has all ``needed`` columns, compressed or not."""
    try:
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [name for name in needed if name not in header]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; see docs/scaling.md")
            rows = list(reader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it is written when a sweep ends") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table ({error})") from error
    if any(row[name] is None for row in rows for name in needed):
        raise UserError(f"{path} has a row with fewer cells than columns; it was cut off")
    return rows


def _number(path: Path, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        which = row.get("hyper_id") or row.get("variant")
        raise UserError(f"{path}: {name}={row[name]!r} of run {which} is not a number")
    return value


def _positive(path: Path, row: dict[str, str], name: str) -> float:
    value = _number(path, row, name)
    if value <= 0:
        which = row.get("hyper_id") or row.get("variant")
        raise UserError(f"{path}: {name}={row[name]} of run {which} must be above 0")
    return value
