"""The balance of every variant: in numbers, side by side, and one at a time."""

import dataclasses
from typing import Any

import numpy as np

from moejax.analysis import figures
from moejax.analysis.health import recent
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.pages import load
from moejax.analysis.pages.sweep_curves import variants_with_experts
from moejax.analysis.run import RunData
from moejax.analysis.statistics import balance
from moejax.analysis.sweep import SweepData
from moejax.analysis.variants import by_name, legend, marked
from moejax.sweep.statistics import estimate

COLUMNS = 3
"""Heatmaps beside each other."""


def page(sweep: SweepData) -> Page:
    variants = variants_with_experts(sweep)
    if not variants:
        return Page("Load", [])
    outcomes, end = by_name(sweep.summary), legend(sweep.summary)
    names = {variant: marked(outcomes[variant]) for variant in variants}
    options: dict[str, list[Block]] = {}
    for variant, runs in variants.items():
        blocks = [_renamed(block, f"{variant}-") for block in load.page(runs[0]).blocks[1:]]
        trial = marked(outcomes[variant], runs[0].name)
        options[names[variant]] = [Text(f"Trial {trial}.{end}"), *blocks]
    shown = {names[variant]: runs for variant, runs in variants.items()}
    together: list[Block] = [_table(shown, end), _first_seeds(shown, end)]
    return Page("Load", [*together, Choice("variant", options)])


def _table(variants: dict[str, list[RunData]], end: str) -> Table:
    """Means over layers and seeds; ``end`` completes the caption."""
    header = (
        "variant", "seeds", "load entropy / log E", "effective experts", "MaxVio", "CV", "dead",
        "drops in training", "in evaluation",
    )  # fmt: skip
    rows = []
    for variant, runs in variants.items():
        loads = [recent(run.arrays("train", "moe/load")[1]) for run in runs]
        columns = [
            [float(np.mean(measure(window.sum(axis=0)))) for window in loads]
            for measure in (
                balance.relative_entropy,
                balance.effective_experts,
                balance.max_violation,
                balance.variation,
            )
        ]
        dead = [float(balance.dead(window).sum()) for window in loads]
        cells = [spread(values, ".3f") for values in columns]
        drops = [
            spread([100 * drop_rate(run, split) for run in runs], ".2f", " %")
            for split in ("train", "eval")
        ]
        rows.append((variant, str(len(runs)), *cells, f"{np.mean(dead):g}", *drops))
    caption = (
        "Of the pairs of the last quarter of logged training rows; means over layers, then over "
        "seeds with the half width of their 95 % interval. dead: experts without a pair in these "
        "rows, all layers. Drops: share of pairs, in the same rows and in the last evaluation."
    )
    return Table(header, rows, caption + end)


def drop_rate(run: RunData, split: str) -> float:
    _, values = run.series(split, "moe/drop_rate")
    if not len(values):
        return float("nan")
    return float(recent(values).mean() if split == "train" else values[-1])


def spread(values: list[float], digits: str, unit: str = "") -> str:
    about = estimate(values)
    half = f" ± {about.half_width:{digits}}" if about.half_width else ""
    return f"{about.mean:{digits}}{half}{unit}"


def _first_seeds(variants: dict[str, list[RunData]], end: str) -> Figure:
    """Layer x expert of the last evaluation, a panel per variant."""
    maps = {
        variant: load.relative(np.asarray(runs[0].held_out[-1]["moe/load"]))
        for variant, runs in variants.items()
    }
    caption = (
        "Load over the layer's mean in the last evaluation of each variant's first finished seed "
        "(n = 1 each)."
    )
    return side_by_side(maps, caption + end)


def side_by_side(maps: dict[str, np.ndarray], caption: str) -> Figure:
    """Load over the mean [layers, experts] by name, a panel each."""
    rows, columns = -(-len(maps) // COLUMNS), min(COLUMNS, len(maps))
    layers = max(len(z) for z in maps.values())
    layout: dict[str, Any] = {
        "grid": {"rows": rows, "columns": columns, "pattern": "independent", "ygap": 0.45},
        "annotations": [],
        "margin": {"t": 40},
    }
    traces = []
    for index, (variant, z) in enumerate(maps.items()):
        suffix = str(index + 1) if index else ""
        traces.append(
            figures.relative_load(
                z,
                name=figures.plain(variant),
                xaxis=f"x{suffix}",
                yaxis=f"y{suffix}",
                showscale=not index,
                hovertemplate="layer %{y}, expert %{x}<br>%{customdata:.3f} x mean load"
                "<extra>%{fullData.name}</extra>",
            )
        )
        layout[f"yaxis{suffix}"] = {
            "title": {"text": "MoE layer"}, "autorange": "reversed", "dtick": max(1, layers // 8),
        }  # fmt: skip
        layout[f"xaxis{suffix}"] = {
            "title": {"text": "expert"}, "dtick": max(1, z.shape[1] // 8),
        }  # fmt: skip
        layout["annotations"].append(
            {
                "text": figures.plain(variant),
                "xref": f"x{suffix} domain",
                "yref": f"y{suffix} domain",
                "x": 0,
                "y": 1,
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
    height = 90 + rows * (110 + 26 * layers)
    return Figure({"data": traces, "layout": layout}, caption, height, "load-side-by-side")


def _renamed(block: Block, prefix: str) -> Block:
    """The block with other names for its figures, so that a page may hold it twice."""
    if isinstance(block, Figure):
        return dataclasses.replace(block, name=f"{prefix}{block.name}")
    if isinstance(block, Choice):
        options = {
            name: [_renamed(inner, prefix) for inner in blocks]
            for name, blocks in block.options.items()
        }
        return dataclasses.replace(block, options=options)
    return block
