"""What a sweep will cost, and what its seeds can find, said before it runs."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.dispatch import TRANSPORTS
from moejax.sweep.count import count
from moejax.sweep.definition import Sweep, Trial
from moejax.sweep.noise import Pilot, detectable_difference, noise, read_pilot
from moejax.sweep.results import Result, read_sweep, unit_of
from moejax.sweep.table import detectable_note, unit


def announce(sweep: Sweep, folder: Path, chosen: Sequence[Trial] | None = None) -> None:
    """Prints the budget of the trials that are not finished, of ``chosen`` ones or of all.

    The folder may not exist yet. FLOPs are counted in a process of its own, about a second for each
    variant.

    Raises:
      UserError: a file of a trial, or the pilot's, cannot be read.
    """
    for line in lines(sweep, folder, chosen):
        print(line, flush=True)


def lines(sweep: Sweep, folder: Path, chosen: Sequence[Trial] | None = None) -> list[str]:
    """The budget, as lines of text."""
    found = read_sweep(folder, sweep)
    finished = {(result.variant, result.seed) for result in found}
    waiting = [
        trial
        for trial in (sweep.trials if chosen is None else chosen)
        if (trial.variant, trial.seed) not in finished
    ]
    said = [_solved(sweep)] if sweep.solved else []
    if waiting:
        said += [_work(waiting), _time(sweep, waiting, found)]
    return [*said, _detectable(sweep, found)]


def _solved(sweep: Sweep) -> str:
    """The widths. How many pairs find no slot is not known before the run."""
    match, baseline = sweep.comparison.match, sweep.comparison.baseline
    names = (baseline, *(solved.variant for solved in sweep.solved))
    drops = match == "active_flops" and any(
        _may_drop(trial.config["moe"]) for trial in sweep.trials if trial.variant in names
    )
    before = " before drops" if drops else ""
    widths = (f"{s.variant} {s.field}={s.width} ({s.ratio:.3f})" for s in sweep.solved)
    return f"matched to {baseline}'s counted {match}{before}: {', '.join(widths)}"


def _may_drop(moe: dict[str, Any]) -> bool:
    """Whether pairs may find no slot, from the ``moe`` section of a resolved config."""
    return "transport" in moe and TRANSPORTS[moe["transport"]]().slot_rules is not None


def _work(trials: Sequence[Trial]) -> str:
    """Trials, steps, tokens and FLOPs, with as many experts per token as each gate means to use."""
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
    """From the variant's own finished trials, or else from those of all; or from the pilot's."""
    trials: Sequence[Result | Pilot] = finished
    pilot, where = sweep.comparison.pilot, "finished"
    if not finished and isinstance(pilot, str):
        trials, where = read_pilot(pilot), "pilot's"
    timed = [trial for trial in trials if math.isfinite(trial.seconds_per_step)]
    if not timed:
        return "time: not known before a trial has finished"
    total = 0.0
    for trial in waiting:
        own = [each for each in timed if each.variant == trial.variant] or timed
        total += statistics.fmean(_seconds(each, trial.steps) for each in own)
    return (
        f"time: about {_duration(total)} one after the other, as the {len(timed)} {where} trials "
        "took, without starting their processes"
    )


def _seconds(trial: Result | Pilot, steps: int) -> float:
    """Compilation and evaluations as in a finished trial, and so many of its steps."""
    return trial.elapsed_seconds + (steps - trial.step) * trial.seconds_per_step


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _detectable(sweep: Sweep, finished: Sequence[Result]) -> str:
    known = noise(sweep, finished)
    found = detectable_difference(sweep, known)
    if found:
        return detectable_note(found, unit_of(finished))
    if known is None:
        first = sweep.comparison.baseline or sweep.variants[0]
        return (
            "what these seeds can tell apart is not known without a pilot: run "
            f"--filter='{first}-seed*' first, or set PILOT to a standard deviation over seeds"
        )
    return "one seed or one variant: there is nothing to tell apart"
