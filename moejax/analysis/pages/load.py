"""The balance of experts: by layer, by expert, over time."""

from collections.abc import Callable

import numpy as np

from moejax.analysis import figures
from moejax.analysis.health import recent
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.run import RunData
from moejax.analysis.statistics import balance
from moejax.train import scales

SPLITS = (("train", "training"), ("eval", "held out"))
SLIDES = 40
"""The most positions of the slider; between them logged steps are averaged."""
LINES = 8
"""More layers than this are drawn as their mean, minimum and maximum."""
LONG = 1000
"""More rows than this are averaged into ``figures.COLUMNS`` points."""

MEASURES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "MaxVio": (balance.max_violation, "Largest load over mean load, minus 1: 0 at balance."),
    "CV": (balance.variation, "Standard deviation of the load over its mean: 0 at balance."),
    "entropy": (balance.relative_entropy, "Entropy of the load over log E: 1 at balance."),
    "effective experts": (
        balance.effective_experts,
        "exp of the load's entropy: so many experts, used equally, have that entropy.",
    ),
    "Gini": (balance.gini, "Gini coefficient of the load: 0 at balance, 1 - 1/E for one expert."),
    "idle experts": (
        lambda load: (load == 0).sum(axis=-1),
        "Experts without a single pair in that row.",
    ),
}


def page(run: RunData) -> Page:
    loads = {
        name: run.arrays(split, "moe/load")
        for split, name in SPLITS
        if len(run.arrays(split, "moe/load")[0])
    }
    if not loads:
        return Page("Load", [])
    blocks: list[Block] = [
        Text(
            "Load: (token, expert) pairs that the gate asked for, dropped ones included. A "
            "training row counts one batch, so some imbalance is due to chance; a held-out row "
            "counts all evaluation rows. Layers are counted from 0 among the MoE layers."
        ),
        summary(loads),
        Choice("layers and experts", {n: [_slides(n, *load)] for n, load in loads.items()}),
        _by_layer(loads),
        Choice(
            "measure of balance",
            {measure: [_measure(measure, *about, loads)] for measure, about in MEASURES.items()},
        ),
    ]
    return Page("Load", blocks)


def summary(loads: dict[str, tuple[np.ndarray, np.ndarray]]) -> Table:
    """The measures at the end, a row per layer and split."""
    rows = []
    for name, (_, load_NME) in loads.items():
        window_WME = recent(load_NME) if name == "training" else load_NME[-1:]
        total_ME, dead_ME = window_WME.sum(axis=0), balance.dead(window_WME)
        for layer, load_E in enumerate(total_ME):
            values = [
                f"{measure(load_E):.3f}"
                for key, (measure, _) in MEASURES.items()
                if key != "idle experts"
            ]
            rows.append((name, str(layer), *values, str(int(dead_ME[layer].sum()))))
    names = [key for key in MEASURES if key != "idle experts"]
    return Table(
        ("rows", "layer", *names, "dead"),
        rows,
        "Of the pairs of the last quarter of logged training rows together, and of the last "
        "evaluation. dead: experts without a pair in any of them.",
    )


def relative(load: np.ndarray) -> np.ndarray:
    """Load over the layer's mean load."""
    return load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)


def _slides(name: str, steps: np.ndarray, load_NME: np.ndarray) -> Figure:
    """Layer x expert, with a slider over steps; it begins at the last one."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), SLIDES))
    shown = [steps[group[-1]] for group in groups]
    maps = [relative(load_NME[group].sum(axis=0)) for group in groups]
    layers, experts = load_NME.shape[1:]
    cells = [figures.relative_load(z) for z in maps]
    trace = {
        **cells[-1],
        "y": [str(layer) for layer in range(layers)],
        "hovertemplate": "layer %{y}, expert %{x}<br>%{customdata:.3f} x mean load<extra></extra>",
    }
    slider = {
        "active": len(shown) - 1,
        "currentvalue": {"prefix": "step "},
        "pad": {"t": 40},
        "steps": [
            {
                "label": str(step),
                "method": "restyle",
                "args": [{"z": [cell["z"]], "customdata": [cell["customdata"]]}],
            }
            for step, cell in zip(shown, cells, strict=True)
        ],
    }
    axes = {"xaxis": {"dtick": max(1, experts // 16)}, "yaxis": figures.names(layers)}
    sliders = [slider] if len(shown) > 1 else []
    spec = figures.chart([trace], "expert", "MoE layer", **axes, sliders=sliders)
    caption = (
        f"{name.capitalize()} load of every expert over its layer's mean, at the step of the "
        "slider. Blue: less than the mean, red: more, darkest from 4 times; a gap: no token."
    )
    return Figure(spec, caption, height=200 + max(120, 34 * layers), name=f"load-{name}")


def _by_layer(loads: dict[str, tuple[np.ndarray, np.ndarray]]) -> Choice:
    """Expert x step, one layer at a time."""
    name, (steps, load_NME) = next(iter(loads.items()))
    at, mean_NME = figures.binned(steps, load_NME)
    options: dict[str, list[Block]] = {}
    for layer in range(load_NME.shape[1]):
        trace = figures.relative_load(
            relative(mean_NME[:, layer]).T,
            x=figures.listed(at),
            hovertemplate="expert %{y}, step %{x}<br>%{customdata:.3f} x mean load<extra></extra>",
        )
        axes = {"yaxis": {"dtick": max(1, load_NME.shape[2] // 16)}}
        spec = figures.chart([trace], "step", "expert", **axes)
        caption = f"{name.capitalize()} load of every expert of layer {layer} over its mean."
        height = 150 + max(160, min(16 * load_NME.shape[2], 480))
        figure = Figure(spec, caption, height=height, name=f"load-layer-{layer}")
        options[str(layer)] = [figure]
    return Choice("over time, layer", options)


def _measure(
    measure: str,
    function: Callable[[np.ndarray], np.ndarray],
    meaning: str,
    loads: dict[str, tuple[np.ndarray, np.ndarray]],
) -> Figure:
    traces = []
    for name, (steps, load_NME) in loads.items():
        dash = "dot" if name == "held out" else "solid"
        traces += by_layer(name, steps, function(load_NME), dash)
    spec = figures.chart(traces, "step", scale(measure, next(iter(loads.values()))[1].shape[-1]))
    slug = measure.replace(" ", "-")
    return Figure(spec, f"{meaning} Dotted: held out.", height=340, name=f"balance-{slug}")


def scale(measure: str, experts: int) -> figures.Scale:
    """The scale of a measure of balance over ``experts``."""
    return {
        "MaxVio": figures.from_0("MaxVio", "max load / mean load - 1", scales.IMBALANCE),
        "CV": figures.from_0("CV of the load", "ratio", scales.IMBALANCE),
        "entropy": figures.Scale("load entropy / log E", "ratio", 0.1, bounds=(0.0, 1.01)),
        "effective experts": figures.Scale(
            "effective experts", "number", bounds=(0.0, 1.02 * experts)
        ),
        "Gini": figures.Scale("Gini coefficient of the load", "0 to 1", bounds=(0.0, 1.0)),
        "idle experts": figures.Scale("idle experts", "number", bounds=(0.0, 1.02 * experts)),
    }[measure]


def by_layer(
    name: str, steps: np.ndarray, values_NM: np.ndarray, dash: str = "solid"
) -> list[figures.Spec]:
    """A line per layer of values [N, layers], or mean and extremes of many layers.

    With very many steps, neighbours are averaged.
    """
    if len(steps) > LONG:
        steps, values_NM = figures.binned(steps, values_NM)
    lines = {f"layer {layer}": values_NM[:, layer] for layer in range(values_NM.shape[1])}
    if len(lines) > LINES:
        ends = {"lowest": values_NM.min(axis=1), "highest": values_NM.max(axis=1)}
        lines = {"mean of layers": values_NM.mean(axis=1), **ends}
    start = f"{name}, " if name else ""
    return [
        figures.line(f"{start}{which}", steps, values, line={"color": f"C{i}", "dash": dash})
        for i, (which, values) in enumerate(lines.items())
    ]
