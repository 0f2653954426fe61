"""Texts on the terminal, as JSON, and with the experts that their tokens visited."""

import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from moejax.data.tokenizers.interface import Tokenizer
from moejax.generate.decode import Visits
from moejax.generate.load import Speaker
from moejax.generate.run import Generated
from moejax.generate.text import Continuation
from moejax.record.generated import GeneratedText, GeneratedTexts

COLOURS = (196, 39, 46, 214, 129, 51, 226, 201, 244, 34, 208, 27)
"""The experts' colours, in turns: numbers of the 256 colours of terminals."""


class Shown:
    """Writes texts to stdout."""

    def __init__(self, tokenizer: Tokenizer, as_json: bool, with_routing: bool):
        self._json, self._with_routing = as_json, with_routing
        self._spelled = tokenizer.token_text() if with_routing else []
        self._coloured = sys.stdout.isatty() and not as_json
        self._written = 0

    def begin(self, prompt: str) -> None:
        """Writes the prompt of the text that will be streamed."""
        _write(prompt)

    def stream(self, number: int, text: Continuation) -> None:
        """Writes the part of the text that is new and will not change."""
        ready = text.ready
        _write(ready[self._written :])
        self._written = len(ready)

    def end(self, text: Generated, streamed: bool) -> None:
        """Writes what has not been written of a finished text."""
        if self._json:
            _write(json.dumps(self._object(text)) + "\n")
            return
        if streamed:
            _write(text.text[self._written :] + "\n")
        else:
            _write(f"{text.prompt}{text.text}\n")
        if self._with_routing and text.visits is not None:
            _write("\n".join(self._table(text, text.visits)) + "\n")

    def _object(self, text: Generated) -> dict:
        found = {
            "prompt": text.prompt,
            "text": text.text,
            "tokens": text.tokens,
            "finish": text.finish,
            "number": text.number,
        }
        if self._with_routing and text.visits is not None:
            found["experts"] = [list(visited(text.visits, n)) for n in range(len(text.tokens))]
        return found

    def _table(self, text: Generated, visits: Visits) -> Iterator[str]:
        """A line per token: its text, and by layer its experts, the heaviest first."""
        cells = [
            ["token", *(f"layer {layer}" for layer in range(visits.expert.shape[1]))],
            *(
                [self._spelled[token], *("+".join(map(str, e)) for e in visited(visits, n))]
                for n, token in enumerate(text.tokens)
            ),
        ]
        width = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for number, row in enumerate(cells):
            padded = [cell.ljust(w) for cell, w in zip(row, width, strict=True)]
            if number and self._coloured:
                padded[1:] = [
                    _coloured(cell, own)
                    for cell, own in zip(padded[1:], visited(visits, number - 1), strict=True)
                ]
            yield "  ".join(padded).rstrip()


def recorded(speaker: Speaker, texts: Sequence[Generated]) -> GeneratedTexts:
    """The experts of the texts' tokens, in the order of the prompts."""
    spelled, model = speaker.tokenizer.token_text(), speaker.task.model
    found = []
    for text in sorted(texts, key=lambda text: text.number):
        assert text.visits is not None
        experts = [list(visited(text.visits, n)) for n in range(len(text.tokens))]
        found.append(GeneratedText(text.prompt, [spelled[t] for t in text.tokens], experts))
    return GeneratedTexts(speaker.step, model.moe.num_experts, model.num_moe_layers, found)


def visited(visits: Visits, number: int) -> Iterator[list[int]]:
    """The experts of one token of one text by layer, the heaviest first."""
    for expert_K, weight_K in zip(visits.expert[number], visits.weight[number], strict=True):
        order = np.argsort(-weight_K, kind="stable")
        yield [int(expert_K[i]) for i in order if weight_K[i] > 0]


def _coloured(cell: str, experts: list[int]) -> str:
    """The cell in the colour of the token's heaviest expert."""
    if not experts:
        return cell
    return f"\x1b[38;5;{COLOURS[experts[0] % len(COLOURS)]}m{cell}\x1b[0m"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
