"""The budget of a sweep, printed before it runs: its cost and the power of its seeds."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.dispatch import TRANSPORTS
from moejax.sweep.count import count
from moejax.sweep.definition import Sweep, Trial
from moejax.sweep.results import Result, read_sweep, unit_of
from moejax.sweep.seed_variance import Pilot, detectable_difference, read_pilot, seed_variance
from moejax.sweep.table import detectable_note, unit
from moejax.train.cost.units import rough_duration


def announce(sweep: Sweep, folder: Path, chosen: Sequence[Trial] | None = None) -> None:
    """Print the budget of the unfinished trials, among all or the ``chosen`` ones.

    The folder need not exist yet. FLOPs are counted in a separate process, about a second for each
    variant.

    Raises:
      UserError: a file of a trial, or the pilot's, cannot be read.
    """
    for line in lines(sweep, folder, chosen):
        print(line, flush=True)


def lines(sweep: Sweep, folder: Path, chosen: Sequence[Trial] | None = None) -> list[str]:
    """The budget, as lines of text."""
    results = read_sweep(folder, sweep)
    finished = {(result.variant, result.seed) for result in results}
    waiting = [
        trial
        for trial in (sweep.trials if chosen is None else chosen)
        if (trial.variant, trial.seed) not in finished
    ]
    budget = [_solved(sweep)] if sweep.solved else []
    if waiting:
        budget += [_work(waiting), _time(sweep, waiting, results)]
    return [*budget, _detectable(sweep, results)]


def _solved(sweep: Sweep) -> str:
    """The matched widths. With capacity, the number of dropped pairs is unknown before the run."""
    match, baseline = sweep.comparison.match, sweep.comparison.baseline
    names = (baseline, *(solved.variant for solved in sweep.solved))
    drops = match == "active_flops" and any(
        _may_drop(trial.config["moe"]) for trial in sweep.trials if trial.variant in names
    )
    before = " before drops" if drops else ""
    widths = (f"{s.variant} {s.field}={s.width} ({s.ratio:.3f})" for s in sweep.solved)
    return f"matched to {baseline}'s counted {match}{before}: {', '.join(widths)}"


def _may_drop(moe: dict[str, Any]) -> bool:
    """True if pairs may find no slot, by the ``moe`` section of a resolved config."""
    return "transport" in moe and TRANSPORTS[moe["transport"]]().slot_rules is not None


def _work(trials: Sequence[Trial]) -> str:
    """Trials, steps, tokens and FLOPs, with as many experts per token as each gate aims at."""
    steps = sum(trial.steps for trial in trials)
    costs = count([trial.config for trial in trials])
    tokens = [
        trial.steps * trial.config["train"]["batch_size"] * cost.tokens_per_row
        for trial, cost in zip(trials, costs, strict=True)
    ]
    flops = sum(n * cost.active_flops for n, cost in zip(tokens, costs, strict=True))
    return (
        f"to run: {len(trials)} trial{'s' * (len(trials) > 1)}, {steps} steps, "
        f"{_short(sum(tokens))} tokens, {_short(flops)}FLOP (counted, nothing dropped)"
    )


def _short(number: float) -> str:
    scale, prefix = unit([number])
    return f"{number / scale:.4g} {prefix}"


def _time(sweep: Sweep, waiting: Sequence[Trial], finished: Sequence[Result]) -> str:
    """The time to run the waiting trials, judged by finished trials or the pilot's."""
    trials: Sequence[Result | Pilot] = finished
    pilot, where = sweep.comparison.pilot, "finished"
    if not finished and isinstance(pilot, str):
        trials, where = read_pilot(pilot), "pilot's"
    timed = [trial for trial in trials if math.isfinite(trial.seconds_per_step)]
    if not timed:
        return "time: unknown until a trial has finished"
    total = 0.0
    for trial in waiting:
        own = [each for each in timed if each.variant == trial.variant] or timed
        total += statistics.fmean(_seconds(each, trial.steps) for each in own)
    return (
        f"time: about {rough_duration(total)} one after the other, judged by the {len(timed)} "
        f"{where} trials, without starting processes"
    )


def _seconds(trial: Result | Pilot, steps: int) -> float:
    """The duration of a finished trial if it had taken ``steps`` steps."""
    return trial.elapsed_seconds + (steps - trial.step) * trial.seconds_per_step


def _detectable(sweep: Sweep, finished: Sequence[Result]) -> str:
    known = seed_variance(sweep, finished)
    detectable = detectable_difference(sweep, known)
    if detectable:
        return detectable_note(detectable, unit_of(finished))
    if known is None:
        first = sweep.comparison.baseline or sweep.variants[0]
        return (
            "the detectable difference is unknown without a pilot: run "
            f"--filter='{first}-seed*' first, or set PILOT to a standard deviation over seeds"
        )
    return "one seed or one variant: there are no differences to test"
