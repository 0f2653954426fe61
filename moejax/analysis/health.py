"""Warnings that a reader needs before trusting a run's numbers, one function per check."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moejax.analysis.run import LEAK, RunData
from moejax.analysis.statistics import balance
from moejax.train.workdir.contents import OUTPUT

DROPS = 0.10
"""Share of dropped pairs above which there is a warning; mean over the last quarter of the run."""
UNSERVED = 0.05
"""The same threshold for the share of tokens that no expert served."""
FALLING = 0.01
"""A loss is still falling if it fell by more than this share since three quarters of the run."""
RISEN = 0.01
"""A held-out loss has risen if it is this share above its lowest."""


class Finding(NamedTuple):
    """A warning: its kind in a word or two, and a sentence with the numbers."""

    kind: str
    text: str


def findings(run: RunData) -> list[Finding]:
    """All warnings of a run, the most serious first."""
    checks: list[Callable[[RunData], list[Finding]]] = [
        _unfinished, _not_finite, leak, _rose, _baseline, _falling, _dead, _collapse, _drops,
    ]  # fmt: skip
    return [finding for check in checks for finding in check(run)]


def recent(values: np.ndarray) -> np.ndarray:
    """The last quarter of rows, at least one."""
    return values[-max(1, len(values) // 4) :]


def _unfinished(run: RunData) -> list[Finding]:
    if run.finished:
        return []
    steps = run.field("train.steps", "?")
    log = run.workdir / OUTPUT
    lines = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    reason = next((line for line in reversed(lines) if "diverged at" in line), "")
    if reason:
        text = f"The run diverged after step {run.last_step} of {steps}. Its log: {reason.strip()}"
        return [Finding("diverged", text)]
    text = (
        f"The run is not finished: it has logged step {run.last_step} of {steps}. It is running, "
        "was stopped, or ended with an error; all numbers here describe the logged part."
    )
    return [Finding("unfinished", text)]


def _not_finite(run: RunData) -> list[Finding]:
    findings = []
    for split, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        steps, values = run.series(split, key)
        bad = steps[~np.isfinite(values)]
        if bad.size:
            text = f"{split} {key} is not finite at step {bad[0]} ({bad.size} rows)."
            findings.append(Finding("not finite", text))
    return findings


def leak(run: RunData) -> list[Finding]:
    """The leak: the tokens besides its past on which a token's output may depend."""
    marks = [row["leak"] for row in [*run.train, *run.held_out] if row.get("leak")]
    if not marks and not run.leak:
        return []
    text = f"Leaks ({marks[-1]}): {explain(marks[-1])}" if marks else ""
    if run.leak:
        gain, tokens = run.leak[LEAK], run.leak.get("leak/tokens", 0)
        ends = run.leak["leak/with_future"], run.leak["leak/without_future"]
        text += (
            f" Measured in evaluation: {gain:.4f} {run.units.loss} ({ends[0]:.4f} with later "
            f"tokens visible, {ends[1]:.4f} without, {tokens} held-out tokens)."
        )
        if not marks and abs(gain) < 1e-3:
            return []
    elif "eval:" in marks[-1] and "future" in marks[-1]:
        text += " The gain from it has not been measured; use `moejax report --measure-leak`."
    return [Finding("leak", text.strip())]


def explain(mark: str) -> str:
    """A leak's mark, such as ``train:future+others eval:future``, as a sentence."""
    what = {"future": "later tokens of its sequence", "others": "other sequences of the batch"}
    phases = {"train": "in training", "eval": "in evaluation"}
    parts = []
    for word in mark.split():
        phase, _, visible = word.partition(":")
        names = " and ".join(what.get(name, name) for name in visible.split("+"))
        parts.append(f"on {names} {phases.get(phase, phase)}")
    return f"a token's output may depend {' and '.join(parts)}."


def _rose(run: RunData) -> list[Finding]:
    steps, loss = run.series("eval", "loss")
    if not len(loss) or not np.isfinite(loss).any():
        return []
    best = int(np.nanargmin(loss))
    if loss[-1] <= loss[best] * (1 + RISEN):
        return []
    text = (
        f"The held-out loss ended at {loss[-1]:.4f}, above its lowest, {loss[best]:.4f} at step "
        f"{steps[best]}: it diverges or overfits."
    )
    return [Finding("loss rose", text)]


def _baseline(run: RunData) -> list[Finding]:
    _, loss = run.series("eval", "loss")
    above = [
        f"{name} ({value:.4f})"
        for name, value in run.saved.get("baselines", {}).items()
        if len(loss) and loss[-1] > value
    ]
    if not above or len(above) < len(run.saved["baselines"]):
        return []
    text = f"The held-out loss, {loss[-1]:.4f}, has beaten no baseline: {', '.join(above)}."
    return [Finding("above baselines", text)]


def _falling(run: RunData) -> list[Finding]:
    """Compare the last held-out loss with the last one of the first three quarters."""
    steps, loss = run.series("eval", "loss")
    if len(loss) < 2 or not math.isfinite(loss[-1]):
        return []
    before = np.flatnonzero(steps <= max(0.75 * steps[-1], steps[0]))[-1]
    earlier = loss[before]
    if earlier - loss[-1] <= FALLING * earlier:
        return []
    text = (
        f"Not converged: the held-out loss fell by {1 - loss[-1] / earlier:.1%} since step "
        f"{steps[before]} of {steps[-1]}, so that comparisons may come out differently after more "
        "steps."
    )
    return [Finding("not converged", text)]


def _dead(run: RunData) -> list[Finding]:
    _, load = run.arrays("train", "moe/load")
    if not len(load):
        return []
    dead = balance.dead(recent(load))
    layers = [
        f"layer {layer}: {', '.join(map(str, np.flatnonzero(row)))}"
        for layer, row in enumerate(dead)
        if row.any()
    ]
    if not layers:
        return []
    window = len(recent(load))
    text = (
        f"Dead experts: {int(dead.sum())} of {dead.size} got no token in the last {window} logged "
        f"training steps ({'; '.join(layers)})."
    )
    return [Finding("dead experts", text)]


def _collapse(run: RunData) -> list[Finding]:
    _, load = run.arrays("train", "moe/load")
    if not len(load):
        return []
    effective = balance.effective_experts(recent(load).sum(axis=0))
    num_experts = load.shape[-1]
    layers = [
        f"layer {layer} as if there were {value:.1f}"
        for layer, value in enumerate(effective)
        if value < num_experts / 2
    ]
    if not layers:
        return []
    text = (
        f"Collapse: of {num_experts} experts, {', '.join(layers)} equally used ones (exp of the "
        "load's entropy, last quarter of training)."
    )
    return [Finding("collapse", text)]


def _drops(run: RunData) -> list[Finding]:
    findings = []
    for split, when in (("train", "in training"), ("eval", "in evaluation")):
        for key, limit, kind, what in (
            ("moe/drop_rate", DROPS, "drops", "of (token, expert) pairs are dropped"),
            ("moe/unserved_rate", UNSERVED, "unserved", "of tokens get no expert in a MoE layer"),
        ):
            _, values = run.series(split, key)
            share = float(recent(values).mean()) if len(values) else 0.0
            if share > limit:
                text = f"{share:.1%} {what} {when} (mean of the last quarter of rows)."
                findings.append(Finding(kind, text))
    return findings
