"""The experts that the tokens of generated texts visited."""

from collections.abc import Sequence

import numpy as np

from moejax.analysis.html import plain
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.run import RunData
from moejax.record.generated import GeneratedText, GeneratedTexts

TOKENS = 256
"""The most tokens of a text that are shown."""

MEANING = (
    "Texts written by `moejax generate --record-routing` with checkpoint {step}. Each token was "
    "routed when it was read to predict the next one. An expert is a row's heaviest where several "
    "were visited. Loads are of few tokens of few texts: the page Load counts held-out text."
)


def page(run: RunData) -> Page:
    try:
        found = GeneratedTexts.read(run.workdir)
    except (ValueError, TypeError, KeyError) as error:
        return Page("Generated", [Text(f"{error}. Run `moejax generate --record-routing` again.")])
    if found is None:
        return Page("Generated", [])
    options = {
        f"{number}: {text.prompt[:40]}": _of_text(found, text, number)
        for number, text in enumerate(found.texts)
    }
    blocks: list[Block] = [Text(MEANING.format(step=found.step)), Choice("prompt", options)]
    return Page("Generated", blocks)


def _of_text(found: GeneratedTexts, text: GeneratedText, number: int) -> Sequence[Block]:
    blocks: list[Block] = [Text(f"{text.prompt} | {''.join(text.tokens)}")]
    if not text.tokens:
        return blocks
    return [
        *blocks,
        _strip(found, text, number),
        _loads(found, text, number),
        Table(
            ["token", *(f"layer {layer}" for layer in range(found.num_layers))],
            [
                [token, *("+".join(map(str, own)) for own in experts)]
                for token, experts in zip(text.tokens[:TOKENS], text.experts, strict=False)
            ],
            "Experts of each token by layer, the heaviest first.",
        ),
    ]


def _strip(found: GeneratedTexts, text: GeneratedText, number: int) -> Figure:
    """Layers by tokens, in the colour of the heaviest expert."""
    shown = text.experts[:TOKENS]
    z = [
        [own[layer][0] if own[layer] else None for own in shown]
        for layer in range(found.num_layers)
    ]
    spec = {
        "data": [
            {
                "type": "heatmap",
                "z": z,
                "zmin": 0,
                "zmax": found.num_experts - 1,
                "text": [[plain(token) for token in text.tokens[:TOKENS]]] * found.num_layers,
                "hovertemplate": "token %{x} %{text}<br>layer %{y}<br>expert %{z}<extra></extra>",
                "colorbar": {"title": {"text": "expert"}},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "token"}},
            "yaxis": {"title": {"text": "layer"}, "dtick": 1, "autorange": "reversed"},
        },
    }
    caption = "The heaviest expert of each generated token, by layer."
    height = 160 + 24 * found.num_layers
    return Figure(spec, caption, height=height, name=f"generated-experts-{number}")


def _loads(found: GeneratedTexts, text: GeneratedText, number: int) -> Figure:
    """Shares of pairs by layer and expert."""
    load_ME = np.zeros((found.num_layers, found.num_experts))
    for experts in text.experts:
        for layer, own in enumerate(experts):
            load_ME[layer, own] += 1
    share_ME = load_ME / np.maximum(load_ME.sum(axis=1, keepdims=True), 1)
    spec = {
        "data": [
            {
                "type": "heatmap",
                "z": share_ME.tolist(),
                "zmin": 0,
                "hovertemplate": "expert %{x}<br>layer %{y}<br>%{z:.1%}<extra></extra>",
                "colorbar": {"title": {"text": "share"}, "tickformat": ".0%"},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "expert"}},
            "yaxis": {"title": {"text": "layer"}, "dtick": 1, "autorange": "reversed"},
        },
    }
    caption = f"Share of each expert in the pairs of {len(text.tokens)} tokens, by layer."
    height = 160 + 24 * found.num_layers
    return Figure(spec, caption, height=height, name=f"generated-load-{number}")
