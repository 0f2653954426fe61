"""Specialisation of experts by domain and token, and how much of routing either explains."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.analysis import figures
from moejax.analysis.figures import Panel, cell_axes, lift_cells, panels
from moejax.analysis.html import plain
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.pages.load import by_layer
from moejax.analysis.probed import of_tokens, over_steps
from moejax.analysis.run import RunData
from moejax.analysis.statistics.kinds import (
    Favourite,
    explained,
    explained_by_chance,
    favourites,
    lift,
    peak_share,
    share_of_kind,
)
from moejax.record.counts import pair_counts
from moejax.record.probe import Probe
from moejax.record.routing import Routed

LEAST = 10
"""Token ids that occur less often are left out: OLMoE's threshold (arXiv 2409.02060)."""
FAVOURITES = 12
SHUFFLES = 20
LABELS = ("domain", "label")


@dataclasses.dataclass(frozen=True)
class Kinds:
    """A way to sort tokens: the id of each token's kind, and the kinds' names."""

    name: str
    kind_T: np.ndarray
    names: Sequence[str]


def kinds_of(probe: Probe, item: str) -> list[Kinds]:
    """Kinds by token, by next token for text, and by label if there are labels.

    Labels of text are called domains.
    """
    texts = [str(text) for text in probe.tokens["token_text"]]
    kinds = [Kinds("token", of_tokens(probe, "token"), texts)]
    if item == "token":
        kinds.append(Kinds("next token", of_tokens(probe, "target"), texts))
    if "label" in probe.tokens:
        names = [str(name) for name in probe.tokens["label_names"]]
        name = "domain" if item == "token" else "label"
        kinds.append(Kinds(name, of_tokens(probe, "label"), names))
    return kinds


def page(run: RunData) -> Page:
    probe = run.probe
    if probe is None or not probe.steps:
        return Page("Specialisation", [])
    last, kinds = probe.routed(probe.steps[-1]), kinds_of(probe, run.units.item)
    blocks: list[Block] = [
        Text(
            f"The kinds of tokens that chose each expert, among the probe's "
            f"{last.first_MT.shape[1]} tokens at step {last.step}. Lift is a share over its value "
            "if the choice were independent of the kind: 1 is independence, 2 is twice that share."
        )
    ]
    labels = next((each for each in kinds if each.name in LABELS), None)
    if labels is None:
        blocks.append(Text("The corpus has no domain labels: there is no picture by domain."))
    else:
        by_label = {str(m): [_labels(last, labels, m)] for m in last.layers}
        blocks.append(Choice(f"{labels.name} and expert, layer", by_label))
    tables = {str(m): [_favourites(last, kinds[0], m)] for m in last.layers}
    blocks += [Choice("tokens of each expert, layer", tables), *_information(probe, last, kinds)]
    return Page("Specialisation", blocks)


def _counts(last: Routed, kinds: Kinds, layer: int) -> np.ndarray:
    return pair_counts(last.selected_MTE[layer], kinds.kind_T, len(kinds.names))


def _labels(last: Routed, labels: Kinds, layer: int) -> Figure:
    counts_CE = _counts(last, labels, layer)
    tokens_C = np.bincount(labels.kind_T, minlength=len(labels.names))
    present_C = tokens_C > 0
    names = [
        f"{plain(name)} ({count})"
        for name, count in zip(labels.names, tokens_C, strict=True)
        if count
    ]
    trace = lift_cells(
        lift(counts_CE)[present_C],
        share_of_kind(counts_CE)[present_C],
        x=list(range(last.num_experts)),
        y=names,
        hovertemplate=(
            "%{customdata[1]:.2%} of the pairs of %{y}<br>go to expert %{x}: "
            "lift %{customdata[0]:.2f}<extra></extra>"
        ),
    )
    spec = figures.chart([trace], "expert", labels.name, **cell_axes(1, last.num_experts))
    caption = (
        f"Layer {layer}. A row is a {labels.name} with its number of tokens. Written: the share of "
        f"the {labels.name}'s (token, expert) pairs that each expert gets, which sum to 100%. "
        "Colour: lift over the expert's share of all pairs; red more, blue less."
    )
    return Figure(spec, caption, height=170 + 42 * len(names), name=f"domains-{layer}")


def _favourites(last: Routed, tokens: Kinds, layer: int) -> Table:
    counts_CE = _counts(last, tokens, layer)
    tokens_C = np.bincount(tokens.kind_T, minlength=len(tokens.names))
    load_E = counts_CE.sum(axis=0)
    by_lift = favourites(counts_CE, tokens_C, LEAST, FAVOURITES)

    def label(favourite: Favourite) -> str:
        return f"{quoted(tokens.names[favourite.kind])}\N{NO-BREAK SPACE}{favourite.lift:.1f}"

    rows = []
    for expert, best in enumerate(by_lift):
        often = np.argsort(-counts_CE[:, expert], kind="stable")[:FAVOURITES]
        frequent = [quoted(tokens.names[int(c)]) for c in often if counts_CE[c, expert]]
        share = load_E[expert] / max(load_E.sum(), 1)
        rows.append((str(expert), f"{share:.1%}", ", ".join(map(label, best)), " ".join(frequent)))
    caption = (
        f"Layer {layer}. Tokens by lift: those that choose the expert more often than others do, "
        f"with the lift, if they occur {LEAST} times or more. Most frequent: its commonest tokens."
    )
    return Table(("expert", "share of pairs", "tokens by lift", "most frequent"), rows, caption)


def quoted(token: str) -> str:
    """Quote a token so that spaces are visible and do not break lines."""
    unbroken = token.replace(" ", "\N{NO-BREAK SPACE}")
    return f"\N{LEFT DOUBLE QUOTATION MARK}{unbroken}\N{RIGHT DOUBLE QUOTATION MARK}"


def _information(probe: Probe, last: Routed, kinds: Sequence[Kinds]) -> list[Block]:
    def at(step: int) -> np.ndarray:
        routed = probe.routed(step)
        return np.array(
            [
                [explained(routed.selected_MTE[m], kind.kind_T) for m in routed.layers]
                for kind in kinds
            ]
        )

    steps, share_SCM = over_steps(probe, at)
    null_CMR = np.array(
        [
            [
                explained_by_chance(last.selected_MTE[m], kind.kind_T, SHUFFLES, seed=0)
                for m in last.layers
            ]
            for kind in kinds
        ]
    )
    charts = []
    for index, kind in enumerate(kinds):
        by_chance = figures.level(
            "by chance, last step", probe.steps, float(null_CMR[index].mean())
        )
        traces = [*by_layer("", steps, share_SCM[:, index]), by_chance]
        scale = figures.whole_share(f"explained by {kind.name}", "share of H(expert)")
        charts.append(Panel("step", scale, traces))
    caption = (
        "I(expert; kind) / H(expert) at each recording: the share of what there is to know about a "
        "pair's expert that the token's kind tells; 0 if it tells nothing, 1 if it decides (with k "
        "choices per token at most 1 - log k / H(expert)). Dotted: what kinds shuffled over tokens "
        "tell, mean over layers; many rare kinds tell something by chance."
    )
    height = 90 + 250 * -(-len(charts) // 2)
    others = " or ".join(f"the {kind.name}" for kind in kinds[1:])
    return [
        Text(
            "OpenMoE found experts that care about the token and not about its context (Xue et "
            "al., arXiv 2402.01739). Then the token explains much more of the routing than "
            f"{others or 'anything else'} does beyond "
            "chance."
        ),
        Figure(panels(charts), caption, height=height, name="information"),
        _against_chance(last, kinds, share_SCM[-1], null_CMR),
    ]


def _against_chance(
    last: Routed, kinds: Sequence[Kinds], share_CM: np.ndarray, null_CMR: np.ndarray
) -> Table:
    rows = []
    for layer in last.layers:
        for index, of in enumerate(kinds):
            counts_CE = _counts(last, of, layer)
            tokens_C = np.bincount(of.kind_T, minlength=len(of.names))
            by_chance = null_CMR[index, layer]
            numbers = (
                f"{share_CM[index, layer]:.4f}",
                f"{by_chance.mean():.4f}",
                f"{by_chance.max():.4f}",
                f"{share_CM[index, layer] - by_chance.mean():.4f}",
                f"{peak_share(counts_CE, tokens_C, LEAST):.3f}",
            )
            rows.append((str(layer), of.name, *numbers))
    header = ("layer", "kind", "explained", "by chance", "largest", "beyond chance", "peak share")
    caption = (
        f"At step {last.step}. Explained: I(expert; kind) / H(expert). By chance: the mean, and "
        f"the largest, of {SHUFFLES} shuffles of kinds over tokens. Peak share: of a kind's tokens "
        f"the share that its favourite expert gets, mean over kinds seen {LEAST} times or more."
    )
    return Table(header, rows, caption)
