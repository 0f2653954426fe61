"""The comparison of runs: curves, final values, costs and differences of their configs."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.analysis import figures, health
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text, Warning
from moejax.analysis.pages import by_source, load
from moejax.analysis.pages.curves import SETTLED
from moejax.analysis.pages.overview import QUARTER, at_end, flops_per_token
from moejax.analysis.pages.sweep_curves import METRICS, converted, curve_scale
from moejax.analysis.pages.sweep_load import side_by_side
from moejax.analysis.run import RunData
from moejax.analysis.several import Several
from moejax.analysis.statistics import balance
from moejax.analysis.variants import LEAKS
from moejax.config import flatten
from moejax.sweep.results import step_seconds
from moejax.train.cost import units

Runs = Mapping[str, RunData]
LIKE_SEEDS = (
    "One run each: these runs do not show how far apart two seeds of one config end, so a small "
    "difference may be chance. `moejax sweep` runs several seeds."
)


def page(several: Several) -> Page:
    runs = several.runs
    blocks: list[Block] = [_losses(runs, several.unit), outcomes(several)]
    blocks += _warnings(several)
    blocks.append(Text(LIKE_SEEDS))
    blocks.append(differences({name: flatten(run.config) for name, run in runs.items()}))
    return Page("Comparison", blocks)


def curves(several: Several) -> Page:
    options: dict[str, list[Block]] = {}
    apart = by_source.metrics(list(several.runs.values()))
    for name, (split, key) in {**METRICS, **apart}.items():
        drawn = _curve(several.runs, name, split, key, several.unit)
        if drawn:
            options[name] = [drawn]
    return Page("Curves", [Choice("metric", options)] if options else [])


def loads(several: Several) -> Page:
    """The last evaluation of each run that has experts."""
    run_loads = {name: _load(run) for name, run in several.runs.items()}
    run_loads = {name: load_ME for name, load_ME in run_loads.items() if load_ME.size}
    if not run_loads:
        return Page("Load", [])
    rows = []
    for name, load_ME in run_loads.items():
        cells = [
            f"{float(np.mean(measure(load_ME))):.3f}"
            for key, (measure, _) in load.MEASURES.items()
            if key != "idle experts"
        ]
        rows.append((name, *cells))
    names = [key for key in load.MEASURES if key != "idle experts"]
    table = Table(("run", *names), rows, "Of the last evaluation, means over layers.")
    maps = {name: load.relative(load_ME) for name, load_ME in run_loads.items()}
    caption = "Load over the layer's mean in the last evaluation (n = 1 run each)."
    return Page("Load", [table, side_by_side(maps, caption)])


def _load(run: RunData) -> np.ndarray:
    """The load [layers, experts] of the last evaluation; empty for a dense run."""
    rows = [row for row in run.held_out if row.get("moe/load")]
    return np.asarray(rows[-1]["moe/load"] if rows else [], float)


def _losses(runs: Runs, unit: str) -> Figure:
    """Held out thick, training thin, a colour per run."""
    traces, shown = [], []
    for index, (name, run) in enumerate(runs.items()):
        for split, style, opacity in (("train", 0.9, 0.5), ("eval", 2.2, 1.0)):
            steps, values = run.series(split, "loss")
            if not len(steps):
                continue
            label = f"{_marked(name, run)}, {'training' if split == 'train' else 'held out'}"
            line = {"color": f"C{index}", "width": style}
            mode = {"mode": "lines" if split == "train" else "lines+markers"}
            traces.append(figures.line(label, steps, values, line=line, opacity=opacity, **mode))
            shown += [*values[len(values) // SETTLED if split == "train" else 0 :]]
    scale = figures.loss("loss", unit, shown)
    spec = figures.chart(traces, "step", scale, yaxis=scale.axis(shown))
    caption = (
        f"Loss in {unit}, one run each. Thick: held out; thin: training, of the logged step's own "
        f"batch.{converted(list(runs.values()))} The axis spans at least {scale.least:.2g} {unit}; "
        "the first steps may lie above it."
    )
    return Figure(spec, caption, height=430, name="loss")


def _marked(name: str, run: RunData) -> str:
    """The run's name, with the sign of a leak."""
    return name if _leak(run) == "none" else f"{name} {LEAKS}"


def _curve(runs: Runs, name: str, split: str, key: str, unit: str) -> Figure | None:
    curves = {label: run.series(split, key) for label, run in runs.items()}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    traces = [
        figures.line(_marked(label, run), *curves[label], line={"color": f"C{index}"})
        for index, (label, run) in enumerate(runs.items())
        if label in curves
    ]
    shown = [x for _, y in curves.values() for x in y[len(y) // SETTLED :] if np.isfinite(x)]
    scale = curve_scale(name, key, unit, shown)
    spec = figures.chart(traces, "step", scale, yaxis=scale.axis(shown), showlegend=True)
    of_training = split == "train" and key.startswith("loss")
    note = converted(list(runs.values())) if of_training else ""
    return Figure(spec, f"{name.capitalize()}, one run each.{note}", 400, f"curves-{name}")


def outcomes(several: Several) -> Table:
    """A column per run: outcome, cost and origin."""
    runs, unit = several.runs, several.unit
    first = next(iter(runs.values()))

    def loss(run: RunData) -> float:
        return run.held_out[-1]["loss"] if run.held_out else math.nan

    def difference(run: RunData) -> str:
        if run is first or not several.same_data:
            return "-"
        return _number(loss(run) - loss(first), "+.4f")

    rows: dict[str, Callable[[RunData], str]] = {
        f"held-out loss, {unit}": lambda run: _number(loss(run), ".4f"),
        "minus that of the first": difference,
        **{
            f"loss on {name}": functools.partial(_of_source, name)
            for name in by_source.sources(runs.values())
        },
        "at step": lambda run: str(run.held_out[-1]["step"] if run.held_out else "-"),
        f"training loss, {unit}": lambda run: _number(at_end(run, "loss"), ".4f"),
        "right predictions": lambda run: _held(run, "accuracy", lambda x: f"{x:.2%}"),
        "pairs dropped, training": lambda run: _number(at_end(run, "moe/drop_rate"), ".2%"),
        "pairs dropped, evaluation": lambda run: _held(run, "moe/drop_rate", lambda x: f"{x:.2%}"),
        "busiest expert, training": lambda run: _number(
            1 + at_end(run, "moe/max_vio"), ".2f", " x"
        ),
        "busiest expert, evaluation": lambda run: _held(
            run, "moe/max_vio", lambda x: f"{1 + x:.2f} x"
        ),
        "dead experts, training": _dead,
        "leak": _leak,
        "warnings": lambda run: ", ".join(dict.fromkeys(f.kind for f in health.findings(run))),
        "parameters": lambda run: _parameters(run, "total"),
        "active per token": lambda run: _parameters(run, "active"),
        "FLOP per token, training": lambda run: _count(flops_per_token(run, "train", "train")),
        "step, median": lambda run: _number(1000 * step_seconds(run.timings)[0], ".1f", " ms"),
        "all steps": lambda run: _duration(step_seconds(run.timings)[1]),
        "devices": _devices,
        "steps": lambda run: f"{run.last_step} of {run.field('train.steps', '?')}",
        "seed": lambda run: str(run.field("train.seed", "?")),
        "data": lambda run: str(run.saved.get("corpus", "?")),
        "data's fingerprint": lambda run: str(run.saved.get("fingerprint", "?"))[:12],
        "commit": lambda run: str(run.saved.get("commit") or "unknown"),
        "command": lambda run: str(run.saved.get("command") or "unknown"),
    }
    cells = [(name, *(cell(run) or "-" for run in runs.values())) for name, cell in rows.items()]
    cells = [row for row in cells if any(cell != "-" for cell in row[1:])]
    caption = (
        f"At the end of each run. Training: {QUARTER}; evaluation: the last one. Busiest expert: "
        "load over the mean load, mean over layers. FLOP: measured active pairs, forward and "
        "backward."
    )
    return Table(("outcome", *runs), cells, caption)


def _number(value: float, digits: str, unit: str = "") -> str:
    return f"{value:{digits}}{unit}" if math.isfinite(value) else "-"


def _held(run: RunData, key: str, form: Callable[[float], str]) -> str:
    return form(run.held_out[-1][key]) if run.held_out and key in run.held_out[-1] else "-"


def _of_source(name: str, run: RunData) -> str:
    return _held(run, by_source.LOSS + name, lambda x: _number(x, ".4f"))


def _leak(run: RunData) -> str:
    """The mark of the last row that has one."""
    marks = [row["leak"] for row in [*run.train, *run.held_out] if row.get("leak")]
    return marks[-1] if marks else "none"


def _dead(run: RunData) -> str:
    _, load_NME = run.arrays("train", "moe/load")
    return str(int(balance.dead(health.recent(load_NME)).sum())) if len(load_NME) else "-"


def _parameters(run: RunData, which: str) -> str:
    return _count(run.saved.get("parameters", {}).get(which))


def _count(value: float | None) -> str:
    return "-" if value is None else units.count(value)


def _duration(seconds: float) -> str:
    return units.duration(seconds) if math.isfinite(seconds) else "-"


def _devices(run: RunData) -> str:
    devices = run.saved.get("devices")
    return f"{devices['count']} {devices['kind']}" if devices else "-"


def _warnings(several: Several) -> list[Block]:
    """Warnings that belong beside the numbers."""
    warnings = [] if several.same_data else [OTHER_DATA]
    runs = several.runs
    ends = {name: run.last_step for name, run in runs.items()}
    if len(set(ends.values())) > 1:
        at = ", ".join(f"{name} {step}" for name, step in ends.items())
        warnings.append(
            f"The runs are at different steps ({at}): their last losses are not at equal"
        )
        warnings[-1] += " lengths of training."
    for name, run in runs.items():
        warnings += [f"{name} {LEAKS}: {finding.text}" for finding in health.leak(run)]
        warnings += [f"{name}: {problem}" for problem in run.problems]
        if not run.finished:
            warnings.append(f"{name} is not finished: it has logged step {run.last_step}.")
    return [Warning(text) for text in warnings]


OTHER_DATA = (
    "The data differ (by fingerprint): the held-out losses are of different texts or examples, so "
    "no difference is computed, and none should be read from the curves."
)


def differences(configs: Mapping[str, Mapping[str, Any]]) -> Table | Text:
    """The fields in which flat configs differ, a column each."""
    names = sorted(set().union(*configs.values()), key=lambda n: (n != "moe.gate.name", n))
    rows = []
    for field in names:
        cells = [repr(of[field]) if field in of else "no such field" for of in configs.values()]
        if len(set(cells)) > 1:
            rows.append((field, *cells))
    if not rows:
        return Text("The configs are equal in every field.")
    return Table(("field", *configs), rows, "Fields of the configs that differ.")
