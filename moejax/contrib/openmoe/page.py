"""The three findings as a page of the report."""

from collections.abc import Sequence

import numpy as np

from moejax.analysis import figures
from moejax.analysis.html import plain
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text, Warning
from moejax.analysis.statistics.values import ratio
from moejax.contrib.openmoe.drops import Drops
from moejax.contrib.openmoe.early import Early
from moejax.contrib.openmoe.findings import Measured
from moejax.contrib.openmoe.tokens import LEAST, POSITION, TOKEN, Layer, Specialisation
from moejax.contrib.openmoe.verdict import Verdict
from moejax.record.counts import choice_counts

SHOWN = 24
"""The number of token ids in the figure of experts: the most frequent ones."""
BINS = 32
"""Points of a curve over positions."""


def page(measured: Measured, verdicts: Sequence[Verdict]) -> Page:
    """Verdicts, then figures and tables of each finding."""
    names = [f"{i}. {verdict}" for i, verdict in enumerate(verdicts, 1)]
    about = (
        f"The three findings of Xue et al. (OpenMoE, arXiv 2402.01739) at step {measured.step} of "
        "this run. docs/openmoe.md has procedure and criteria; openmoe.json has the numbers."
    )
    leaks = [f"A token may see more than its past: {measured.leak}"] if measured.leak else []
    return Page(
        "OpenMoE's findings",
        [
            Text(about),
            *map(Warning, leaks),
            *map(Text, names),
            *_specialisation(measured),
            *_early(measured.early),
            *_drops(measured.drops),
        ],
    )


def _specialisation(measured: Measured) -> list[Block]:
    layers = {
        f"layer {i}": [_shares(measured, i), _spreads(measured.specialisation.layers[i], i)]
        for i in measured.routed.layers
    }
    return [Choice("Specialisation in", layers), _spread_table(measured.specialisation)]


def _shares(measured: Measured, layer: int) -> Figure:
    """r of the most frequent token ids."""
    routed = measured.routed
    token_T = routed.token_NL[routed.valid_NL].astype(np.int64)
    count_V = np.bincount(token_T)
    often = np.argsort(-count_V, kind="stable")[:SHOWN]
    often = often[count_V[often] > LEAST][::-1]  # the first row of a heatmap is at the bottom
    choice_TK = routed.choices(layer)[routed.valid_NL]
    table_CE = choice_counts(choice_TK, token_T, len(count_V), routed.num_experts)[often]
    share_CE = ratio(table_CE, table_CE.sum(axis=1, keepdims=True))
    names = [_token(measured.token_text, int(v)) for v in often]
    cells = figures.heatmap(share_CE, range(routed.num_experts), names, "choices, share")
    caption = (
        f"r(token id): of the choices of a token id's occurrences, the share that each expert of "
        f"MoE layer {layer} gets, for the {len(often)} most frequent ids. 1 / experts = "
        f"{1 / routed.num_experts:.3f} everywhere would be no specialisation."
    )
    spec = figures.chart([cells], "expert", "token id", yaxis={"type": "category"})
    return Figure(spec, caption, 480, f"openmoe-shares-{layer}")


def _token(texts: list[str], token: int) -> str:
    """A token as an axis label; its id too, because labels must differ."""
    return f"{plain(texts[token])} ({token})" if texts else str(token)


def _spreads(layer: Layer, number: int) -> Figure:
    """Histogram of the standard deviations, of ids, positions, and by chance."""
    ids, positions = layer.first[TOKEN], layer.first[POSITION]
    series = {
        "token ids": ids.values,
        "token ids, shuffled": ids.shuffled,
        "positions": positions.values,
    }
    edge = ids.largest or 1.0
    traces = [
        {
            "type": "histogram",
            "x": values,
            "name": name,
            "histnorm": "probability",
            "opacity": 0.6,
            "xbins": {"start": 0.0, "end": edge * 1.025, "size": edge / 40},
        }
        for name, values in series.items()
    ]
    caption = (
        f"How unevenly the first choices of a token id, or of a position, spread over the experts "
        f"of MoE layer {number}: one value per kind with more than {LEAST} occurrences. 0 is even, "
        f"{ids.largest:.3f} one expert only."
    )
    x = figures.Scale("standard deviation of r over experts", "share", bounds=(0.0, edge))
    y = figures.Scale("kinds", "share", bounds=(0.0, 1.0), format=".0%")
    spec = figures.chart(traces, x, y, barmode="overlay")
    return Figure(spec, caption, name=f"openmoe-spread-{number}")


def _spread_table(specialisation: Specialisation) -> Table:
    header = ["layer", "kind", "kinds", "std", "chance", "top-k std", "chance", "largest"]
    rows = []
    for i, layer in enumerate(specialisation.layers):
        for kind, first in layer.first.items():
            all_k = layer.shares[kind]
            numbers = (first.mean, first.chance, all_k.mean, all_k.chance, all_k.largest)
            information = f"{layer.information[kind]:.3f}"
            spreads = [f"{x:.4f}" if first.kinds else "-" for x in numbers]
            rows.append([str(i), kind, str(first.kinds), *spreads, information])
    caption = (
        f"Mean standard deviation over experts of r(kind), for kinds with more than {LEAST} "
        "occurrences: of first choices (at most sqrt(1/E - 1/E^2)) and of all k choices (at most "
        "the column `largest`), beside the mean of shuffled kinds. Last column: share of the first "
        "choice's entropy that the kind tells, corrected for chance."
    )
    return Table([*header, "information"], rows, caption)


def _early(early: Early) -> list[Block]:
    steps = [compared.step for compared in early.steps]
    series = {
        "router saturation": [float(np.mean(compared.saturation)) for compared in early.steps],
        "of first choices": [float(np.mean(compared.first_saturation)) for compared in early.steps],
        "cosine of r(token id)": [float(np.mean(compared.cosine)) for compared in early.steps],
    }
    traces = [figures.line(name, steps, values) for name, values in series.items()]
    chance = {"saturation by chance": early.chance, "cosine of other ids": early.others}
    traces += [figures.level(name, steps, float(np.mean(x))) for name, x in chance.items()]
    caption = (
        f"Routing of {early.tokens} tokens ({early.source}) at each step against step "
        f"{early.last}, means over layers. Cosines are of the {early.kinds} ids with more than "
        f"{LEAST} occurrences."
    )
    scale = figures.whole_share("equal to the last step", "share or cosine")
    spec = figures.chart(traces, "step", scale)
    return [Figure(spec, caption, name="openmoe-early")]


def _drops(measured: list[Drops]) -> list[Block]:
    texts = list(dict.fromkeys(drops.text for drops in measured))
    options: dict[str, list[Block]] = {}
    for i, text in enumerate(texts):
        of_text = [drops for drops in measured if drops.text == text]
        options[text] = [_curves(of_text, i), _drop_table(of_text)]
    return [Choice("Drops on", dict(options))]


def _curves(measured: list[Drops], number: int) -> Figure:
    length = len(measured[0].choices)
    bins = np.array_split(np.arange(length), min(BINS, length))
    middle = [float(part.mean()) for part in bins]
    traces = []
    for drops in measured:
        rate_L = np.array(drops.choices)
        traces.append(figures.line(drops.arm.name, middle, [float(rate_L[b].mean()) for b in bins]))
    caption = (
        f"Share of choices dropped by position, all MoE layers, {measured[0].rows} rows of "
        f"{measured[0].text}; means of {len(bins)} stretches of positions. Batch-prioritised order "
        "lets a token's place depend on later tokens."
    )
    spec = figures.chart(traces, "position", figures.share("dropped", "share of choices"))
    return Figure(spec, caption, name=f"openmoe-drops-{number}")


def _drop_table(measured: list[Drops]) -> Table:
    header = ["slots", "choices", "any", "all", "first quarter", "last quarter"]
    rows = []
    for drops in measured:
        tokens = (float(np.nanmean(drops.any)), float(np.nanmean(drops.all)))
        shares = (drops.rate.value, *tokens, drops.early.value, drops.late.value)
        low, high = 100 * drops.rise.low, 100 * drops.rise.high
        rise = f"{drops.rise.value:+.1%} [{low:+.1f}, {high:+.1f}]"
        rows.append([drops.arm.name, *(f"{x:.1%}" for x in shares), rise])
    caption = (
        "Share of choices dropped; of tokens that lost any choice, and all; of choices in the "
        "first and the last quarter of positions; and the rise of a straight line from the first "
        "position to the last, with its 95% interval over rows."
    )
    return Table([*header, "rise"], rows, caption)
