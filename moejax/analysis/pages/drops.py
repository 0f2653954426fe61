"""Dropped pairs by layer, expert, rank, position and step."""

import numpy as np

from moejax.analysis import figures
from moejax.analysis.figures import WRITTEN
from moejax.analysis.health import recent
from moejax.analysis.page import Block, Choice, Figure, Page, Text
from moejax.analysis.pages.load import by_layer
from moejax.analysis.run import RunData
from moejax.train import scales

NAMES = {"train": "training", "eval": "held out"}


def page(run: RunData) -> Page:
    if not run.has_experts:
        return Page("Drops", [])
    blocks: list[Block] = [
        Text(
            "A pair (token, expert) is dropped when its expert has no room for it; the token keeps "
            "what its other experts and the residual connection give."
        ),
        _rate(run),
    ]
    for split, name in NAMES.items():
        _, dropped_NME = run.arrays(split, "moe/dropped")
        _, load_NME = run.arrays(split, "moe/load")
        if not len(dropped_NME) or dropped_NME.shape != load_NME.shape:
            continue
        if not dropped_NME.any():
            transport = run.field("moe.transport" if split == "train" else "moe.eval_transport")
            blocks.append(Text(f"No pair was dropped, {name} (transport {transport})."))
            continue
        blocks.append(Choice(f"dropped, {name}", _where(run, split)))
    return Page("Drops", blocks)


def _rate(run: RunData) -> Figure:
    traces = []
    for split, name in NAMES.items():
        for key, what in (
            ("moe/drop_rate", "pairs"),
            ("moe/unserved_rate", "tokens with no expert"),
        ):
            steps, share = run.series(split, key)
            if len(steps):
                traces.append(figures.line(f"{what}, {name}", steps, share))
    spec = figures.chart(traces, "step", figures.share("dropped", "share of pairs or tokens"))
    caption = "Share of pairs that were dropped, and of tokens none of whose experts had room."
    return Figure(spec, caption, height=340, name="drop-rate")


def _where(run: RunData, split: str) -> dict[str, list[Block]]:
    """Drops by layer over time, and by expert, rank and position over the last quarter of rows."""
    steps, dropped_NME = run.arrays(split, "moe/dropped")
    _, load_NME = run.arrays(split, "moe/load")
    _, choice_NMK = run.arrays(split, "moe/dropped_by_choice")
    _, position_NML = run.arrays(split, "moe/dropped_by_position")
    _, experts_N = run.series(split, "moe/experts_per_token")
    options: dict[str, list[Block]] = {
        "by layer": [_by_layer(split, steps, dropped_NME, load_NME)],
        "by expert": [_by_expert(split, dropped_NME, load_NME)],
    }
    if len(choice_NMK) == len(experts_N) == len(load_NME):
        tokens_N = _ratio(load_NME.sum(axis=-1).mean(axis=-1), experts_N)
        options["by choice"] = [_by_choice(split, choice_NMK, tokens_N)]
    if len(position_NML) == len(load_NME):
        options["by position"] = [_by_position(split, position_NML, load_NME)]
    return options


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """A ratio that is 0 where there was nothing to drop."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)


def _by_layer(split: str, steps: np.ndarray, dropped: np.ndarray, load: np.ndarray) -> Figure:
    share_NM = _ratio(dropped.sum(axis=-1), load.sum(axis=-1))
    scale = figures.share("dropped", "share of pairs")
    spec = figures.chart(by_layer("", steps, share_NM), "step", scale)
    return Figure(spec, "Share of each layer's pairs.", height=340, name=f"drops-layer-{split}")


def _by_expert(split: str, dropped_NME: np.ndarray, load_NME: np.ndarray) -> Figure:
    share_ME = _ratio(recent(dropped_NME).sum(axis=0), recent(load_NME).sum(axis=0))
    layers, experts = share_ME.shape
    trace = figures.heatmap(
        share_ME,
        list(range(experts)),
        [str(layer) for layer in range(layers)],
        "dropped, share of pairs",
        hovertemplate="layer %{y}, expert %{x}<br>%{z:.2%} of its pairs<extra></extra>",
    )
    trace["colorbar"]["tickformat"] = ".0%"
    if experts <= WRITTEN:
        trace["texttemplate"] = "%{z:.1%}"
    axes = {"xaxis": {"dtick": max(1, experts // 16)}, "yaxis": figures.names(layers)}
    spec = figures.chart([trace], "expert", "MoE layer", **axes)
    caption = (
        "Share of the pairs of each expert that were dropped, last quarter of the rows. Colours "
        "from 0 to 100 %."
    )
    return Figure(spec, caption, height=150 + max(120, 34 * layers), name=f"drops-expert-{split}")


def _by_choice(split: str, counts_NMK: np.ndarray, tokens_N: np.ndarray) -> Figure:
    dropped_MK, tokens = recent(counts_NMK).sum(axis=0), recent(tokens_N).sum()
    share_MK = _ratio(dropped_MK, np.broadcast_to(tokens, dropped_MK.shape))
    ranks = [str(rank + 1) for rank in range(share_MK.shape[1])]
    traces = [
        {"type": "bar", "name": f"layer {layer}", "x": ranks, "y": share_K.tolist()}
        for layer, share_K in enumerate(share_MK)
    ]
    scale, axes = figures.share("choice dropped", "share of tokens"), {"type": "category"}
    spec = figures.chart(traces, "column of the routing", scale, xaxis=axes)
    caption = (
        "Share of tokens whose first, second, ... choice was dropped, last quarter of the rows. "
        "For gates without an order of choices the columns are in the order of their experts."
    )
    return Figure(spec, caption, height=340, name=f"drops-choice-{split}")


def _by_position(split: str, counts_NML: np.ndarray, load_NME: np.ndarray) -> Figure:
    """Pairs per position are not recorded; every position has the same number of tokens."""
    dropped_ML = recent(counts_NML).sum(axis=0)
    pairs_M1 = recent(load_NME).sum(axis=(0, 2))[:, None] / dropped_ML.shape[1]
    share_ML = _ratio(dropped_ML, np.broadcast_to(pairs_M1, dropped_ML.shape))
    position = np.arange(dropped_ML.shape[1])
    traces = by_layer("", position, share_ML.T)
    # At one position more than the mean number of pairs may be dropped: all of its pairs.
    scale = figures.from_0("dropped", "share of the mean pairs per position", scales.SHARE)
    axis = {"tickformat": ".1%"}
    spec = figures.chart(traces, "position in the sequence", scale, yaxis=axis)
    caption = (
        "Dropped pairs at each position over the mean number of pairs per position, last quarter "
        "of the rows. With priority=position, later tokens find experts full."
    )
    return Figure(spec, caption, height=360, name=f"drops-position-{split}")
