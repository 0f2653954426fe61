"""The outcome of a run in a picture and a table, with warnings, what ran and its cost."""

import math
from collections.abc import Sequence
from typing import Any

from moejax import gating
from moejax.analysis import health
from moejax.analysis.page import Block, Page, Table, Text, Warning
from moejax.analysis.pages import by_source
from moejax.analysis.pages.curves import loss
from moejax.analysis.run import RunData
from moejax.config import default, flatten, set_gate, to_dict
from moejax.config.saved import entry_text
from moejax.config.tasks import LANGUAGE
from moejax.sweep.results import kept_pairs, step_seconds
from moejax.train.cost import units

QUARTER = "mean of the last quarter of logged steps"

PAIRS = {"moe/experts_per_token", "moe/drop_rate"}


def page(run: RunData) -> Page:
    findings = health.findings(run)
    blocks: list[Block] = []
    if run.train or run.held_out:
        outcome = Table(("outcome", ""), [*_outcome(run), *_marks(findings), *_made(run)])
        blocks += [loss(run, "overview-loss"), outcome]
    blocks += [Warning(finding.text) for finding in findings]
    blocks.append(Text(verdict(run)))
    if run.problems:
        blocks.append(Warning("Not everything could be read. " + " ".join(run.problems)))
    blocks += [
        Table(("what ran", ""), _settings(run)),
        Table(("cost", ""), _cost(run)),
        _differences(run.config),
    ]
    return Page("Overview", blocks)


def verdict(run: RunData) -> str:
    """The outcome in two or three sentences."""
    if not run.held_out:
        if not run.train:
            return "Nothing has been logged yet."
        row = run.train[-1]
        value = f"{row['loss']:.4f} {run.units.loss}"
        return f"Training loss {value} at step {row['step']}; not evaluated yet."
    row = run.held_out[-1]
    bits = f" ({row['bits_per_byte']:.4f} bits/byte)" if "bits_per_byte" in row else ""
    text = f"Held-out loss {row['loss']:.4f} {run.units.loss}{bits} at step {row['step']}"
    beside = [
        f"{abs(row['loss'] - value):.4f} {'below' if row['loss'] < value else 'above'} the {name} "
        f"model's {value:.4f}"
        for name, value in run.saved.get("baselines", {}).items()
    ]
    text += f", {' and '.join(beside)}." if beside else "."
    if "accuracy" in row:
        text += f" {row['accuracy']:.2%} of {run.units.item}s are predicted right."
    if row.keys() >= {"moe/max_vio", "moe/drop_rate"}:
        if any("moe/drop_rate" in row for row in run.train):
            text += (
                f" In training {at_end(run, 'moe/drop_rate'):.2%} of pairs were dropped and the "
                f"busiest expert had {1 + at_end(run, 'moe/max_vio'):.2f} times the mean load "
                f"({QUARTER}, mean over layers)."
            )
        text += (
            f" In that evaluation (transport {run.field('moe.eval_transport', '?')}) "
            f"{row['moe/drop_rate']:.2%} of pairs were dropped and the busiest expert had "
            f"{1 + row['moe/max_vio']:.2f} times the mean load."
        )
    return text


def at_end(run: RunData, key: str) -> float:
    """A number of the training rows, mean over their last quarter; NaN if none has it."""
    _, values = run.series("train", key)
    return float(health.recent(values).mean()) if len(values) else math.nan


def _outcome(run: RunData) -> list[tuple[str, str]]:
    """Losses, drops and balance of training and evaluation, each with the mean it is."""
    rows, unit = [], run.units.loss
    held = run.held_out[-1] if run.held_out else {}
    if held:
        rows.append(("held-out loss", f"{held['loss']:.4f} {unit} at step {held['step']}"))
    if "bits_per_byte" in held:
        rows.append(("the same in bits", f"{held['bits_per_byte']:.4f} bits/byte"))
    for name in by_source.sources([run]) if held else ():
        if by_source.LOSS + name in held:
            rows.append((f"loss on {name}", f"{held[by_source.LOSS + name]:.4f} {unit}"))
    if run.saved.get("baselines"):
        beside = [f"{name} {value:.4f}" for name, value in run.saved["baselines"].items()]
        rows.append(("without a model", f"{', '.join(beside)} {unit}"))
    if run.train:
        rows.append(("training loss", f"{at_end(run, 'loss'):.4f} {unit}, {QUARTER}"))
    if "accuracy" in held:
        rows.append(("right predictions", f"{held['accuracy']:.2%}, held out"))
    trained = any("moe/drop_rate" in row for row in run.train)
    for name, key, form in (
        ("pairs dropped", "moe/drop_rate", lambda x: f"{x:.2%}"),
        ("busiest expert", "moe/max_vio", lambda x: f"{1 + x:.2f} x the mean load"),
    ):
        if trained:
            rows.append((f"{name}, training", f"{form(at_end(run, key))}, {QUARTER}"))
        if key in held:
            rows.append((f"{name}, evaluation", f"{form(held[key])}, {_evaluation(run)}"))
    return rows


def _evaluation(run: RunData) -> str:
    transport = run.field("moe.eval_transport", "")
    return "last evaluation" + (f" (transport {transport})" if transport else "")


def _marks(findings: Sequence[health.Finding]) -> list[tuple[str, str]]:
    """The kinds of warnings, whose sentences follow below."""
    kinds = ", ".join(dict.fromkeys(finding.kind for finding in findings))
    return [("warnings", f"{kinds}: see below" if kinds else "none")]


def _made(run: RunData) -> list[tuple[str, str]]:
    """Seed, commit and command, which reproduce the numbers."""
    saved = run.saved
    made = " ".join([str(saved.get("source", "?")), *saved.get("overrides", [])])
    return [
        ("seed", str(run.field("train.seed", "?"))),
        ("commit", str(saved.get("commit") or "unknown")),
        ("command", str(saved.get("command") or f"unknown; the config was made from {made}")),
    ]


def _settings(run: RunData) -> list[tuple[str, str]]:
    field = run.field
    mesh = [
        f"{axis}={size}" for axis, size in (field("mesh") or {}).items() if axis != "cpu_devices"
    ]
    devices = run.saved.get("devices")
    on = f" on {devices['count']} {devices['kind']} device(s)" if devices else ""
    layers, width = field("model.num_layers"), field("model.d_model", "?")
    rows = [
        ("run", str(run.workdir)),
        ("model", f"{layers} layers of width {width}" if layers else str(field("task.name"))),
        ("experts", _experts(run)),
        ("mesh", " x ".join(mesh) + on),
        ("data", str(run.saved.get("corpus", "?"))),
        ("training", _training(run)),
        ("made from", " ".join([run.saved.get("source", "?"), *run.saved.get("overrides", [])])),
        ("moejax", str(run.saved.get("version", "?"))),
    ]
    return rows + [("history", entry_text(entry)) for entry in run.saved.get("history", ())]


def _experts(run: RunData) -> str:
    field = run.field
    if not field("moe.every"):
        return "none: dense feed-forward layers"
    if field("task.gate_input"):  # of several tasks
        return (
            f"{field('moe.num_experts')} of width {field('moe.d_ff')}, task.sharing="
            f"{field('task.sharing')}; gate {field('moe.gate.name')}, which sees the "
            f"{field('task.gate_input')}; every example visits all"
        )
    where = "every layer" if field("moe.every") == 1 else f"one layer of {field('moe.every')}"
    shared = f", {field('moe.shared_experts')} shared" if field("moe.shared_experts") else ""
    return (
        f"{field('moe.num_experts', '?')} of width {field('moe.d_ff', '?')} in {where}{shared}; "
        f"gate {field('moe.gate.name', '?')}; transport {field('moe.transport', '?')} "
        f"({field('moe.eval_transport', '?')} in evaluation)"
    )


def _training(run: RunData) -> str:
    batch, of = run.field("train.batch_size"), run.units
    text = f"{run.last_step} of {run.field('train.steps', '?')} steps"
    if batch:
        items = units.count(run.last_step * batch * of.items_per_row)
        length = f" x {of.items_per_row}" if of.items_per_row > 1 else ""
        text += f" of {batch}{length} {of.item}s: {items} {of.item}s"
    return text


def _cost(run: RunData) -> list[tuple[str, str]]:
    rows = []
    parameters = run.saved.get("parameters")
    if parameters:
        total, active = (units.count(parameters[name]) for name in ("total", "active"))
        rows.append(("parameters", f"{total}, {active} active per token"))
    for split, phase, what in (
        ("train", "train", "FLOPs per token, forward and backward"),
        ("eval", "eval", "FLOPs per token in evaluation"),
    ):
        flops = flops_per_token(run, split, phase)
        if flops is not None:
            rows.append((what, f"{units.count(flops)} (measured active pairs)"))
    median, total = step_seconds(run.timings) if run.timings else (math.nan, math.nan)
    if math.isfinite(median):
        rows.append(("step", f"{1000 * median:.1f} ms (median)"))
        rows.append(("all steps", f"{units.duration(total)}, without compilation and evaluation"))
    if run.timings and run.speeds in run.timings[-1]:
        speed = units.count(run.timings[-1][run.speeds])
        rows.append(("speed at the end", f"{speed} {run.units.item}s/s"))
    memory = run.saved.get("memory")
    if memory:
        total, state = units.size(sum(memory.values())), units.size(memory["state"])
        rows.append(("memory expected per device", f"{total}, {state} of it state and gradients"))
    return rows


def flops_per_token(run: RunData, split: str, phase: str) -> float | None:
    """fixed + per_pair x layers x kept pairs (docs/sweeps.md), mean over the rows of a split."""
    counted = run.saved.get("flops", {}).get(phase)
    rows = run.rows(split) if split == "train" else run.held_out[-1:]
    if not counted or not rows or not all(row.keys() >= PAIRS for row in rows if "moe/load" in row):
        return None
    pairs = [len(row.get("moe/load", ())) * (kept_pairs(row) or 0.0) for row in rows]
    return counted["fixed"] + counted["per_pair"] * sum(pairs) / len(pairs)


def _differences(config: dict[str, Any]) -> Table | Text:
    """Fields that are not at their defaults; the gate's own are compared with the gate's."""
    now = flatten(config)
    before = flatten(to_dict(default(now.get("task.name", LANGUAGE))))
    before |= _gate_defaults(now.get("moe.gate.name"))
    rows = [
        (name, repr(value), repr(before[name]) if name in before else "no such field")
        for name, value in sorted(now.items())
        if name not in before or _json(value) != _json(before[name])
    ]
    if not rows:
        return Text("Every field of the config is at its default.")
    return Table(
        ("field", "value", "default"), rows, "Fields of the config that are not at their defaults."
    )


def _gate_defaults(name: Any) -> dict[str, Any]:
    """The fields of a gate without its name; empty for a gate that is not known here."""
    if name not in gating.names():
        return {}
    config = default()
    set_gate(config, name)
    fields = flatten(to_dict(config)["moe"]["gate"], "moe.gate.")
    return {field: value for field, value in fields.items() if field != "moe.gate.name"}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
