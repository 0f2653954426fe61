"""Co-activation of experts, and transitions from layer to layer."""

import numpy as np

from moejax.analysis import figures
from moejax.analysis.figures import WRITTEN, cell_axes, lift_cells
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.run import RunData
from moejax.analysis.statistics.choices import (
    coactivation,
    coactivation_by_chance,
    transition_lift,
    transitions,
)
from moejax.record.routing import Routed

PAIRS = 10
"""The number of most co-activated pairs in the table."""


def page(run: RunData) -> Page:
    probe = run.probe
    if probe is None or not probe.steps:
        return Page("Co-activation", [])
    last = probe.routed(probe.steps[-1])
    return Page("Co-activation", [*_together(last), *_following(last)])


def _together(last: Routed) -> list[Block]:
    choices = last.selected_MTE.sum(axis=2)
    if choices.max() <= 1:
        return [
            Text(
                "Every token of the probe chose at most one expert, so that no two experts are "
                "chosen together: there is no co-activation to show."
            )
        ]
    if choices.min() == last.num_experts > 1:
        return [Text("Every token chose all experts: all are chosen together, always.")]
    options: dict[str, list[Block]] = {}
    for layer in last.layers:
        together_EE = coactivation(last.selected_MTE[layer])
        by_chance = coactivation_by_chance(last.selected_MTE[layer])
        options[str(layer)] = [
            _matrix(together_EE, by_chance, layer, last.step),
            _pairs(together_EE),
        ]
    return [
        Text(
            "Of the tokens that chose expert i, the share that chose j too. Two experts that are "
            "chosen together much more than by chance do one job between them; if all rows look "
            "alike, the columns only repeat how loaded the experts are."
        ),
        Choice("co-activation, layer", options),
    ]


def _matrix(together_EE: np.ndarray, by_chance: float, layer: int, step: int) -> Figure:
    experts = list(range(len(together_EE)))
    trace = figures.heatmap(
        together_EE,
        experts,
        experts,
        "tokens of i that chose j, share",
        hoverongaps=False,
        hovertemplate="of the tokens of expert %{y}, %{z:.1%} chose expert %{x} too<extra></extra>",
    )
    trace["colorbar"]["tickformat"] = ".0%"
    if len(experts) <= WRITTEN:
        trace["texttemplate"] = "%{z:.0%}"
    caption = (
        f"Layer {layer} at step {step}. Row i: the tokens that chose expert i; column j: the share "
        f"of them that also chose j. Without preferences every cell is {by_chance:.1%}. The "
        "diagonal is left out, as are rows of experts that no token chose. Colours from 0 to 100 %."
    )
    spec = figures.chart([trace], "expert j", "expert i", **cell_axes(len(experts), len(experts)))
    return Figure(spec, caption, height=_height(len(experts)), name=f"coactivation-{layer}")


def _pairs(together_EE: np.ndarray) -> Table:
    """The strongest pairs, each once: the expert of the larger share first."""
    known_EE = np.nan_to_num(together_EE)
    first_EE = (known_EE > known_EE.T) | np.triu(known_EE == known_EE.T)
    strength_EE = np.where(first_EE, known_EE, 0.0)
    order = np.argsort(-strength_EE, axis=None, kind="stable")[:PAIRS]
    rows = [
        (str(i), str(j), f"{together_EE[i, j]:.1%}", f"{together_EE[j, i]:.1%}")
        for i, j in (divmod(int(cell), len(known_EE)) for cell in order)
        if strength_EE[i, j] > 0
    ]
    header = ("i", "j", "of i's tokens, chose j", "of j's tokens, chose i")
    return Table(header, rows, f"The pairs with the largest shares, at most {PAIRS}.")


def _following(last: Routed) -> list[Block]:
    pairs = list(zip(last.layers, last.layers[1:], strict=False))
    if not pairs:
        return [Text("The model has one MoE layer: there are no transitions to show.")]
    options: dict[str, list[Block]] = {}
    for first, second in pairs:
        share_EE = transitions(last.first_MT[first], last.first_MT[second], last.num_experts)
        options[f"{first} to {second}"] = [_transitions(share_EE, first, second, last.step)]
    return [
        Text(
            "From a token's first choice in one MoE layer to that in the next. Lift 1: the layers "
            "choose independently. Rows with one strong cell are paths that tokens keep to; then "
            "the second layer's choice could be foreseen, and its experts fetched ahead."
        ),
        Choice("transitions, layers", options),
    ]


def _transitions(share_EE: np.ndarray, first: int, second: int, step: int) -> Figure:
    experts = list(range(len(share_EE)))
    trace = lift_cells(
        transition_lift(share_EE),
        share_EE,
        x=experts,
        y=experts,
        hovertemplate=(
            f"expert %{{y}} in layer {first}, %{{x}} in layer {second}<br>"
            "%{customdata[1]:.2%} of tokens, lift %{customdata[0]:.2f}<extra></extra>"
        ),
    )
    caption = (
        f"Step {step}. Colour: lift, the share of tokens that take this path over what it would be "
        f"if layer {second} were independent of layer {first}; red more, blue less. Numbers: "
        "share of all tokens. A gap: no token took the path."
    )
    axes = (f"first choice in layer {second}", f"first choice in layer {first}")
    spec = figures.chart([trace], *axes, **cell_axes(len(experts), len(experts)))
    return Figure(spec, caption, height=_height(len(experts)), name=f"transitions-{first}")


def _height(experts: int) -> int:
    return 150 + max(180, min(34 * experts, 480))
