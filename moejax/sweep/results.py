"""Numbers of finished trials, from ``config.json``, ``metrics.jsonl`` and ``timings.jsonl``.

Training numbers are means over the steps of the run: a logged row stands for the steps since the
previous row. Held-out numbers are those of the last evaluation.
"""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.config.saved import METRICS, TIMINGS, missing_steps, read_config, steps_per_row
from moejax.errors import UserError
from moejax.record.files import read_rows, write_whole
from moejax.sweep import folder as folders
from moejax.sweep.definition import Sweep, Trial
from moejax.train.cost.units import PER_BYTE, bytes_per_token

Row = dict[str, Any]

DIVERGED = "moejax: diverged at"
"""The prefix of the line in which `moejax train` reports divergence."""
LOGGED = "train.log_every"
"""The field with the interval of training rows."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The numbers of one finished trial. Fields that a dense model lacks are None.

    Active FLOPs are those of the matrix products (a multiply-add is two) of the attention, the
    dense layers, the router and the head, counted on the traced program, plus those of one expert
    on one token times the measured (token, expert) pairs: routed and not dropped. They exclude the
    padding of cells and rematerialisation.
    """

    variant: str
    seed: int
    id: str
    step: int
    loss: float
    """Held-out loss at the last evaluation; per byte for text."""
    train_flops_per_token: float
    """Forward and backward, mean over the run."""
    eval_flops_per_token: float
    """Forward, at the last evaluation."""
    train_pairs_per_token: float | None
    """Experts that computed a token, per MoE layer."""
    eval_pairs_per_token: float | None
    seconds_per_step: float
    """Median over the logged intervals after the first."""
    train_seconds: float
    """All steps together, without compilation, evaluation and saving."""
    elapsed_seconds: float
    """From before the compilation to the last step, summed over all starts of the run."""
    train_max_vio: float | None
    eval_max_vio: float | None
    train_drop_rate: float | None
    eval_drop_rate: float | None
    total_parameters: int
    leak: str
    """The tokens besides its past on which a token's output may depend; empty if none."""
    unit: str = PER_BYTE
    """The unit of the loss."""
    missing_steps: int = 0
    """Steps whose rows are missing in metrics.jsonl; means over training leave them out."""
    loss_by_source: dict[str, float] = dataclasses.field(default_factory=dict)
    """The held-out loss of each source of a mixture, in the same unit. results.csv has them as
    loss/NAME."""


def unit_of(results: Sequence[Result]) -> str:
    """The common unit of the losses.

    Raises:
      UserError: they have different units.
    """
    units = {result.unit: result for result in results}
    if len(units) > 1:
        listing = ", ".join(f"{unit} of {result.variant}" for unit, result in units.items())
        raise UserError(
            f"losses of several units cannot be compared: {listing}; shards of an older version do "
            "not record how many bytes their tokens stand for, so prepare them again"
        )
    return next(iter(units), PER_BYTE)


def read_trial(folder: Path, trial: Trial) -> Result:
    """The numbers of a finished trial.

    Raises:
      UserError: a file of it cannot be read.
    """
    workdir = folders.workdir_of(folder, trial)
    saved = read_config(workdir)
    rows = read_rows(workdir / METRICS)
    train = [row for row in rows if row.get("split") == "train"]
    held_out = [row for row in rows if row.get("split") == "eval"][-1]
    steps = [row["step"] for row in train]
    weights = steps_per_row(steps, saved, LOGGED)
    gaps = missing_steps(steps, saved, LOGGED, held_out["step"])
    timings = read_rows(workdir / TIMINGS)
    own = steps_per_row([row["step"] for row in timings], saved, LOGGED)
    seconds, total_seconds = step_seconds(timings, own, held_out["step"])

    def mean(values: Iterable[float | None]) -> float | None:
        pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None]
        return sum(v * w for v, w in pairs) / sum(w for _, w in pairs) if pairs else None

    layers = len(held_out.get("moe/load", ()))
    of_bytes = evaluated_bytes_per_token(saved, workdir)
    train_pairs = mean(kept_pairs(row) for row in train)
    eval_pairs = kept_pairs(held_out)
    return Result(
        variant=trial.variant,
        seed=trial.seed,
        id=trial.id,
        step=held_out["step"],
        loss=held_out["loss"] / (of_bytes or 1.0),
        train_flops_per_token=_flops(saved["flops"]["train"], layers, train_pairs),
        eval_flops_per_token=_flops(saved["flops"]["eval"], layers, eval_pairs),
        train_pairs_per_token=train_pairs,
        eval_pairs_per_token=eval_pairs,
        seconds_per_step=seconds,
        train_seconds=total_seconds,
        elapsed_seconds=elapsed_seconds(timings),
        train_max_vio=mean(row.get("moe/max_vio") for row in train),
        eval_max_vio=held_out.get("moe/max_vio"),
        train_drop_rate=mean(row.get("moe/drop_rate") for row in train),
        eval_drop_rate=held_out.get("moe/drop_rate"),
        total_parameters=saved["parameters"]["total"],
        leak=held_out["leak"],
        missing_steps=sum(last - first + 1 for first, last in gaps),
        unit=PER_BYTE if of_bytes else saved["units"]["loss"],
        loss_by_source=_losses_by_source(saved, held_out, of_bytes is not None),
    )


def _losses_by_source(saved: dict[str, Any], row: Row, per_byte: bool) -> dict[str, float]:
    """The losses of the sources of a mixture; of text each per byte of its own."""
    return {
        name: row[f"loss/{name}"] / ((bytes_per_token(about) if per_byte else None) or 1.0)
        for name, about in saved.get("mixture", {}).items()
        if f"loss/{name}" in row
    }


def evaluated_bytes_per_token(saved: dict[str, Any], workdir: Path) -> float | None:
    """Bytes of text per token of the evaluated targets; None if the losses are not of text or the
    shards do not record it.

    Raises:
      UserError: an older version recorded a ratio for other tokens.
    """
    of_all = saved.get("heldout_bytes_per_token", 1.0)
    if "evaluated" not in saved and of_all != 1.0:
        raise UserError(
            f"{workdir} was written by an older version of moejax, which does not record how many "
            "bytes its evaluated tokens stand for; remove that folder and run the sweep again"
        )
    return bytes_per_token(saved)


def kept_pairs(row: Row) -> float | None:
    """Computed pairs per MoE layer and token; None without experts.

    ``moe/experts_per_token`` counts only tokens that reached the experts, which under
    Mixture-of-Depths is a share of them.
    """
    if "moe/load" not in row:
        return None
    reached = row.get("mod/to_experts", 1.0)
    return reached * row["moe/experts_per_token"] * (1 - row["moe/drop_rate"])


def _flops(counted: dict[str, float], layers: int, pairs: float | None) -> float:
    return counted["fixed"] + counted["per_pair"] * layers * (pairs or 0.0)


def step_seconds(
    timings: Sequence[Row], own: Sequence[int] | None = None, steps: int = 0
) -> tuple[float, float]:
    """Seconds of the median step and of all steps, from the rows of ``timings.jsonl``.

    The median leaves out the first interval after each start, when caches are cold. An interval
    that only compiled has no time; its steps, and those with a missing row, count as median steps.

    Args:
      own: the number of steps that each row stands for (default: those since the previous row).
      steps: the number of steps of the run (default: the last row's).
    """
    warm, sums, before = [], [], 0
    lengths = iter(own) if own is not None else None
    for life in _lives(timings):
        for row in life:
            seconds = row["seconds_per_step"]
            length = next(lengths) if lengths else row["step"] - before
            if math.isfinite(seconds):
                sums.append((seconds, length))
                if row is not life[0]:
                    warm.append(seconds)
            before = row["step"]
    measured = warm or [seconds for seconds, _ in sums]
    if not measured:
        return math.nan, math.nan
    median = statistics.median(measured)
    counted = sum(steps for _, steps in sums)
    total = sum(seconds * steps for seconds, steps in sums)
    return median, total + median * (max(before, steps) - counted)


def elapsed_seconds(timings: Sequence[Row]) -> float:
    """The sum over all starts of the run of their last ``elapsed``."""
    return sum((life[-1]["elapsed"] for life in _lives(timings)), start=0.0)


def _lives(timings: Sequence[Row]) -> list[list[Row]]:
    """The rows of each start of the run.

    Each start has its own ``from_step``: rows after the step that a run resumes from are removed
    first. Older versions wrote none; there ``elapsed`` decreases at a start.
    """
    lives: list[list[Row]] = []
    for row in timings:
        before = lives[-1][-1] if lives else None
        if before is None or row.get("from_step") != before.get("from_step"):
            lives.append([row])
        elif "from_step" not in row and row["elapsed"] < before["elapsed"]:
            lives.append([row])
        else:
            lives[-1].append(row)
    return lives


def read_sweep(folder: Path, sweep: Sweep) -> list[Result]:
    """The results of all finished trials, in the sweep's order.

    Raises:
      UserError: a file of a trial cannot be read, or lacks what this version writes.
    """
    results = []
    for trial in sweep.trials:
        if folders.finished(folder, trial):
            try:
                results.append(read_trial(folder, trial))
            except KeyError as error:
                raise UserError(
                    f"{folders.workdir_of(folder, trial)} has no {error}: another version of "
                    "moejax wrote it; remove that folder and run the sweep again"
                ) from error
    return results


def read_diverged(folder: Path, sweep: Sweep) -> set[tuple[str, int]]:
    """Variant and seed of the trials whose last attempt diverged."""
    diverged = set()
    for trial in sweep.trials:
        path = folders.log_of(folder, trial)
        if path.exists() and not folders.finished(folder, trial):
            # An attempt starts with a # and its command.
            lines = path.read_text(errors="replace").splitlines()
            begin = max((i for i, line in enumerate(lines) if line.startswith("# ")), default=0)
            if any(line.startswith(DIVERGED) for line in lines[begin:]):
                diverged.add((trial.variant, trial.seed))
    return diverged


def write_csv(
    folder: Path,
    sweep: Sweep,
    results: Sequence[Result],
    more: Mapping[tuple[str, int], Row] | None = None,
) -> None:
    """Write results.csv: a row per trial, with floats that read back exactly.

    An unfinished trial has a row without numbers. ``more`` has further columns by variant and seed.
    """
    more = more or {}
    by_name = {(result.variant, result.seed): result for result in results}
    text = io.StringIO()
    fields = [f.name for f in dataclasses.fields(Result) if f.name != "loss_by_source"]
    sources = dict.fromkeys(f"loss/{name}" for r in results for name in r.loss_by_source)
    names = dict.fromkeys(name for row in more.values() for name in row)
    header = [*fields[:3], "finished", *fields[3:], *sources, *names]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for trial in sweep.trials:
        result = by_name.get((trial.variant, trial.seed))
        known = {"variant": trial.variant, "seed": trial.seed, "id": trial.id}
        if result:
            values = dataclasses.asdict(result)
            apart = values.pop("loss_by_source")
            known = {k: v for k, v in values.items() if v is not None}
            known |= {f"loss/{name}": loss for name, loss in apart.items()}
        known |= more.get((trial.variant, trial.seed), {})
        writer.writerow({**known, "finished": int(result is not None)})
    write_whole(folder / "results.csv", text.getvalue())
