"""The stability of routing, and the similarity of experts and of their inputs."""

from collections.abc import Callable

import numpy as np

from moejax.analysis import figures
from moejax.analysis.figures import WRITTEN, Panel, cell_axes, panels
from moejax.analysis.page import Block, Choice, Figure, Page, Text
from moejax.analysis.pages.load import by_layer
from moejax.analysis.probed import over_steps
from moejax.analysis.run import RunData
from moejax.analysis.statistics.choices import churn, saturation, saturation_by_chance
from moejax.analysis.statistics.values import between
from moejax.record.counts import NONE
from moejax.record.probe import Probe

SIMILARITIES = {
    "expert_similarity": ("expert weights", "the flattened weights of experts"),
    "router_similarity": ("router vectors", "the router's vectors of experts"),
}

COSINES = (-1.0, 1.0)
"""The scale of every cosine: one of 0.2 is no near copy and must not look like one."""

DECADE = 1.0
"""The least span of a logarithmic axis, in powers of ten."""


def page(run: RunData) -> Page:
    probe = run.probe
    if probe is None or not probe.steps:
        return Page("Stability", [])
    return Page("Stability", [*_moves(probe), *_similar(probe), *_representation(probe)])


def churns(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Steps after the first, and the churn [S, M] since the recording before each."""
    first_choices = [probe.routed(step).first_MT for step in probe.steps]
    moved = [
        [churn(before_T, after_T) for before_T, after_T in zip(before, after, strict=True)]
        for before, after in zip(first_choices, first_choices[1:], strict=False)
    ]
    return np.asarray(probe.steps[1:]), np.array(moved)


def saturations(probe: Probe, first: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps, saturation [S, M] of all choices or of the first ones, and its mean by chance."""

    def chosen(step: int) -> np.ndarray:
        routed = probe.routed(step)
        if not first:
            return routed.selected_MTE
        return (routed.first_MT[..., None] == np.arange(routed.num_experts)) & (
            routed.first_MT[..., None] != NONE
        )

    last_MTE = chosen(probe.steps[-1])

    def at(step: int) -> np.ndarray:
        pairs = zip(chosen(step), last_MTE, strict=True)
        return np.array([saturation(selected_TE, last_TE) for selected_TE, last_TE in pairs])

    blind = float(np.mean([saturation_by_chance(selected_TE) for selected_TE in last_MTE]))
    return *over_steps(probe, at), blind


def _moves(probe: Probe) -> list[Block]:
    if len(probe.steps) < 2:
        return [
            Text(
                f"Routing was recorded at step {probe.steps[0]} only: churn and saturation need "
                "two recordings. They are made before the first step and at every evaluation "
                "(train.eval_every)."
            )
        ]
    steps, churn_SM = churns(probe)
    scale = figures.whole_share("first choice changed", "share of tokens")
    spec = figures.chart(by_layer("", steps, churn_SM), "step", scale)
    caption = (
        "Share of the probe's tokens whose first choice is another expert than at the recording "
        "before. It should fall during training: tokens that keep moving between experts teach "
        "each of them little (StableMoE, arXiv 2204.08396). Compare gates at equal intervals."
    )
    return [
        Figure(spec, caption, height=340, name="churn"),
        Choice(
            "saturation",
            {
                "all choices": [_saturation(probe, False)],
                "first choice": [_saturation(probe, True)],
            },
        ),
    ]


def _saturation(probe: Probe, first: bool) -> Figure:
    steps, share_SM, blind = saturations(probe, first)
    traces = [*by_layer("", steps, share_SM), figures.level("by chance", probe.steps, blind)]
    which = "first choices" if first else "chosen experts"
    scale = figures.whole_share("same as at the last recording", f"share of {which}")
    spec = figures.chart(traces, "step", scale)
    caption = (
        f"Router saturation (OLMoE, arXiv 2409.02060, eq. 5): the share of {which} that are those "
        f"of step {probe.steps[-1]}, where it is 100% by definition. Early and high: routing is "
        "learned long before the experts are. Dotted: unrelated routing, evenly spread."
    )
    return Figure(spec, caption, height=340, name=f"saturation-{'first' if first else 'all'}")


def _similar(probe: Probe) -> list[Block]:
    last = probe.at(probe.steps[-1])
    blocks: list[Block] = []
    charts = []
    for name, (title, _) in SIMILARITIES.items():
        if name not in last:
            blocks.append(
                Text("This gate has no vector per expert: router vectors are not compared.")
            )
            continue
        steps, mean_SM = over_steps(probe, _between(probe, name))
        lines = by_layer("", steps, mean_SM)
        scale = figures.Scale(f"mean cosine of {title}", "-1 to 1", bounds=COSINES)
        charts.append(Panel("step", scale, lines))
        maps = {str(m): [_map(name, cosine_EE, m)] for m, cosine_EE in enumerate(last[name])}
        blocks.append(Choice(f"similarity of {title}, layer", maps))
    caption = (
        "Mean cosine between different experts. Rising towards 1, experts become copies of each "
        "other; at 0 they are unrelated, as random initialisation leaves them."
    )
    figure = Figure(panels(charts), caption, height=340, name="similarity")
    return [figure, *blocks]


def _between(probe: Probe, name: str) -> Callable[[int], np.ndarray]:
    return lambda step: between(probe.at(step)[name])


def _map(name: str, cosine_EE: np.ndarray, layer: int) -> Figure:
    experts = len(cosine_EE)
    shown_EE = cosine_EE.astype(np.float64)
    np.fill_diagonal(shown_EE, np.nan)
    trace = figures.heatmap(
        shown_EE,
        list(range(experts)),
        list(range(experts)),
        "cosine, -1 to 1",
        COSINES,
        hoverongaps=False,
        hovertemplate="experts %{y} and %{x}: cosine %{z:.3f}<extra></extra>",
    )
    caption = (
        f"Layer {layer}, last recording: cosine between {SIMILARITIES[name][1]}. Red: alike, blue: "
        "opposed. The diagonal, 1, is left out. Colours always reach from -1 to 1: blocks of the "
        "darkest red are groups of near copies, pale ones are not."
    )
    if experts <= WRITTEN:
        trace["texttemplate"] = "%{z:.2f}"
    spec = figures.chart([trace], "expert", "expert", **cell_axes(experts, experts))
    height = 150 + max(180, min(30 * experts, 460))
    return Figure(spec, caption, height=height, name=f"{name.replace('_', '-')}-{layer}")


def _representation(probe: Probe) -> list[Block]:
    charts = []
    trace = "Tr(\N{GREEK CAPITAL LETTER SIGMA}w \N{GREEK CAPITAL LETTER SIGMA}b+)"
    for name, scale in (
        ("collapse", figures.Scale(trace, "ratio", DECADE)),
        ("participation", figures.from_0("participation ratio", "directions", 1.0)),
    ):
        steps, value_SM = over_steps(probe, lambda step, name=name: probe.at(step)[name])
        value_SM = value_SM.astype(np.float64)
        axis = {}
        if name == "collapse":
            with np.errstate(divide="ignore", invalid="ignore"):
                axis = scale.axis(np.log10(value_SM).ravel()) | {"type": "log", "dtick": "D2"}
        charts.append(Panel("step", scale, by_layer("", steps, value_SM), axis))
    caption = (
        "Of the inputs of each MoE layer. Left: variation within the tokens of one expert over "
        "that between experts (X-MoE, arXiv 2204.09179), on a logarithmic axis; falling towards 0, "
        "the tokens of an expert collapse to a point. Right: along how many directions tokens "
        "vary, at most d_model."
    )
    return [
        Text(
            "Routing pulls a token's representation towards the vector of its expert. If that goes "
            "too far, representations collapse: both curves fall together. A falling left curve "
            "beside a steady right one says that experts tell their tokens apart."
        ),
        Figure(panels(charts), caption, height=340, name="representation"),
    ]
