"""Tokens as text while they arrive: whole characters, and stop strings."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moejax.data.tokenizers.interface import Tokenizer

Finish = Literal["", "eos", "stop", "length"]
"""The reason why a text ended; "" while it has not."""

UNFINISHED = "\ufffd"
"""Tokens that are parts of a character are decoded to this."""

CONTEXT = 8
"""Tokens of the prompt that a continuation is decoded with: some tokenizers spell the first token
of a text in another way than the same token within one."""


class Continuation:
    """The continuation of one prompt.

    ``tokens`` has no token for the end of a text. ``text`` ends before a stop string; the tokens of
    a stop string are in ``tokens``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: np.ndarray,
        stops: Sequence[str] = (),
        eos: Sequence[int] = (),
    ):
        self._tokenizer, self._stops, self._eos = tokenizer, tuple(stops), eos
        self._before = [int(token) for token in prompt[-CONTEXT:]]
        self._text_before = tokenizer.decode(self._before)
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Finish = ""

    def add(self, tokens: Sequence[int], most: int) -> None:
        """Takes up further tokens until the text ends, at the latest with ``most`` of them."""
        if self.finish:
            return
        for token in tokens:
            if token in self._eos:
                self.finish = "eos"
                break
            self.tokens.append(int(token))
            if self._stops:
                self._look_for_stops()
            if not self.finish and len(self.tokens) >= most:
                self.finish = "length"
            if self.finish:
                break
        if self.finish != "stop":
            self.text = self._decoded()

    @property
    def ready(self) -> str:
        """The beginning of the text that no further token changes."""
        if self.finish:
            return self.text
        text = self.text.rstrip(UNFINISHED)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - held]

    def _decoded(self) -> str:
        text = self._tokenizer.decode([*self._before, *self.tokens])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return self._tokenizer.decode(self.tokens)

    def _look_for_stops(self) -> None:
        text = self._decoded()
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.text, self.finish = text[: min(found)], "stop"


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that a stop string begins with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
