"""Time, arithmetic, bytes and memory."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moejax.analysis import figures, traffic
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.run import RunData
from moejax.record.files import parsed
from moejax.train import scales
from moejax.train.cost import units

PROFILES = ("profile.json", "profile/profile.json")
"""Places in a workdir of the table of `moejax profile --out=WORKDIR/profile`."""


def page(run: RunData) -> Page:
    blocks: list[Block] = []
    if run.timings:
        blocks.append(Choice("over time", _times(run)))
    blocks.append(_split(run))
    if run.has_experts and run.train:
        blocks += _padding(run)
    memory = run.saved.get("memory")
    if memory:
        rows = [
            ("state and gradients", units.size(memory["state"])),
            ("kept for the backward pass", units.size(memory["activations"])),
            ("together", units.size(sum(memory.values()))),
        ]
        blocks.append(
            Table(
                ("memory per device", "expected"),
                rows,
                "Counted before the run, from shapes and shardings: parameters, gradients and "
                "optimizer moments, and the arrays that the backward pass reads.",
            )
        )
    return Page("Cost", blocks)


def _times(run: RunData) -> dict[str, list[Block]]:
    items = f"{run.units.item}s"
    measures = {
        "step time": ("seconds_per_step", 1000, "ms per step"),
        f"{items} per second": (run.speeds, 1, f"{items} per second"),
        "MFU": ("mfu", 1, "share of the devices' peak"),
    }
    captions = {
        "step time": "Mean over the steps since the row before, without compilation.",
        f"{items} per second": f"Training {items} of all devices together.",
        "MFU": "FLOPs of the model's forward and backward pass per second over the devices' peak, "
        "measured by a matrix product where no peak is published.",
    }
    steps = [row["step"] for row in run.timings]
    options: dict[str, list[Block]] = {}
    for name, (key, scale, unit) in measures.items():
        values = np.asarray([row.get(key, math.nan) for row in run.timings], float) * scale
        scale = figures.from_0(
            "speed" if key == run.speeds else name, unit, scales.least_relative(values)
        )
        if key == "mfu":
            scale = figures.share(name, unit)
        spec = figures.chart([figures.line(name, steps, values)], "step", scale)
        options[name] = [Figure(spec, captions[name], height=320, name=f"time-{key}")]
    return options


def _split(run: RunData) -> Block:
    path = next((run.workdir / name for name in PROFILES if (run.workdir / name).exists()), None)
    profile = _read(path) if path else None
    if not profile:
        return Text(
            "Where a step's time goes is not recorded in training. `moejax profile --config="
            f"{run.workdir} --out={run.workdir / 'profile'}` traces a few steps of this config; "
            "the next report shows them here."
        )
    rows = profile["rows"]
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "y": [row["part"] for row in rows],
        "x": [row["ms"] for row in rows],
        "customdata": [row["share"] for row in rows],
        "hovertemplate": "%{y}: %{x:.2f} ms, %{customdata:.1%}<extra></extra>",
    }
    scale = figures.from_0("time", "ms per step", scales.least_relative(trace["x"]))
    axis = {"type": "category", "autorange": "reversed"}
    spec = figures.chart([trace], scale, "part of a step", yaxis=axis)
    caption = (
        f"Parts of a step, forward and backward, over {profile.get('steps', '?')} traced steps on "
        f"{profile.get('devices', '?')} {profile.get('device', '?')} device(s); docs/profile.md "
        "says what each part holds."
    )
    return Figure(spec, caption, height=90 + 28 * len(rows), name="step-split")


def _read(path: Path) -> dict[str, Any] | None:
    """The table of a profile; None if the file is not one."""
    try:
        profile = parsed(path.read_text())
    except (OSError, ValueError):
        return None
    rows = profile.get("rows") if isinstance(profile, dict) else None
    complete = rows and all({"part", "ms", "share"} <= row.keys() for row in rows)
    return profile if complete else None


def _padding(run: RunData) -> list[Block]:
    rows = [row for row in run.train if row.get("moe/load") and row.get("moe/dropped")]
    counted = [(row["step"], traffic.of_row(run, row)) for row in rows]
    counted = [(step, row_traffic) for step, row_traffic in counted if row_traffic]
    if not counted:
        return [Text("The transport's rows and bytes cannot be derived from this config.")]
    steps = [step for step, _ in counted]
    waste = [row_traffic.computed_over_kept for _, row_traffic in counted]
    transport = run.field("moe.transport")
    spec = figures.chart(
        [figures.line("rows computed / pairs kept", steps, waste)],
        "step",
        figures.from_0("rows computed / pairs kept", "ratio", 1.0),
    )
    caption = (
        f"Rows that the experts of transport {transport} compute in training over the pairs that "
        "were routed and not dropped, mean over layers: 1 is no waste. Padding inside a device's "
        "matrix-product kernels is not counted."
    )
    blocks: list[Block] = [Figure(spec, caption, height=320, name="padding")]
    last = counted[-1][1]
    if last.sent_over_minimum is None or last.sent is None:
        shards = run.field("mesh.expert")
        why = "a single expert shard exchanges nothing" if shards == 1 else "not in the counts"
        blocks.append(Text(f"Bytes exchanged between devices: {why} (transport {transport})."))
    else:
        cells = [
            ("sent to experts, per layer and step", units.size(last.sent)),
            ("over the minimum", f"{last.sent_over_minimum:.3f}"),
        ]
        text = (
            "All devices together, one way, of the last logged step; the minimum is a copy of each "
            "token per pair on another device (dropped pairs included), with tokens and experts "
            f"spread evenly over {run.field('mesh.expert')} expert shards."
        )
        blocks.append(Table(("bytes between devices", ""), cells, text))
    return blocks
