"""What ran, on what, at what cost, how it came out, and what to beware of."""

import math
from typing import Any

from moejax import gating
from moejax.analysis import health
from moejax.analysis.page import Block, Page, Table, Text, Warning
from moejax.analysis.run import RunData
from moejax.config import default, flatten, set_gate, to_dict
from moejax.saved import told
from moejax.sweep.results import kept_pairs, step_seconds
from moejax.task_table import LANGUAGE
from moejax.train import units

PAIRS = {"moe/experts_per_token", "moe/drop_rate"}


def page(run: RunData) -> Page:
    blocks: list[Block] = [Text(verdict(run))]
    blocks += [Warning(finding.text) for finding in health.findings(run)]
    if run.problems:
        blocks.append(Warning("Not everything could be read. " + " ".join(run.problems)))
    blocks += [
        Table(("what ran", ""), _what(run)),
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
        loss = f"{row['loss']:.4f} {run.units.loss}"
        return f"Training loss {loss} at step {row['step']}; not evaluated yet."
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
        text += (
            f" In that evaluation the busiest expert had {1 + row['moe/max_vio']:.2f} times the "
            f"mean load (mean over layers) and {row['moe/drop_rate']:.2%} of pairs were dropped."
        )
    return text


def _what(run: RunData) -> list[tuple[str, str]]:
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
    return rows + [("history", told(entry)) for entry in run.saved.get("history", ())]


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
    """The fields of a gate without its name; none of a gate that is not known here."""
    if name not in gating.names():
        return {}
    config = default()
    set_gate(config, name)
    fields = flatten(to_dict(config)["moe"]["gate"], "moe.gate.")
    return {field: value for field, value in fields.items() if field != "moe.gate.name"}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
