"""Perplexity of a text file, by windows that slide over it."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from moejax.config import Config
from moejax.data.documents import find_documents
from moejax.data.text_stream import encode_documents
from moejax.data.tokenizers.interface import Tokenizer, before_documents, before_text
from moejax.errors import UserError
from moejax.tasks.language.mixture import Mixture
from moejax.tasks.language.source import TextSource
from moejax.train import scoring
from moejax.train.cost import budget
from moejax.train.evaluate import open_run
from moejax.train.metrics.rows import Divergence

FLAG = "--text"
MOST = 700.0
"""The perplexity of a larger loss overflows."""


@dataclasses.dataclass(frozen=True)
class Sliding:
    """A text file and the windows to read it with. 0: the run's ``train.seq_len``, and half a
    window."""

    path: str
    window: int = 0
    stride: int = 0
    tokenizer: str = ""

    def sized(self, seq_len: int) -> "Sliding":
        """With numbers for the zeros.

        Raises:
          UserError: a window or a stride that does not exist.
        """
        window = self.window or seq_len
        stride = self.stride or max(window // 2, 1)
        if window < 1:
            raise UserError(f"--window={self.window} must be a number of tokens, at least 1")
        if not 1 <= stride <= window:
            raise UserError(
                f"--stride={stride} must be from 1 to the window of {window} tokens, so that every "
                "token is scored"
            )
        return dataclasses.replace(self, window=window, stride=stride)


class Window(NamedTuple):
    """Inputs ``begin`` to ``end`` of a text; the targets from number ``new`` on are scored here."""

    begin: int
    end: int
    new: int


def windows(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over the ``tokens`` inputs of a text with as many targets, each scored once.

    Window i begins at input ``i * stride``. Input n predicts target n, so that a target of the
    second and later windows is predicted from more than ``window - stride`` inputs.
    """
    new = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        yield Window(begin, end, new)
        new = end
        if end == tokens:
            return


def perplexity(config: Config, workdir: str, step: int | None, text: Sliding) -> dict[str, Any]:
    """The loss of a text file under a run's checkpoint.

    The text is encoded with the run's tokenizer, behind the tokens that stand before the documents
    of the training text (the opening, or else the separator), so that its first token is predicted
    too. Nothing is added behind it. Bits per byte divide the nats of all tokens by the bytes of
    the file.

    Raises:
      UserError: see `scoring.check`, `read` and `moejax.train.evaluate.open_run`.
      Divergence: the loss is not finite.
    """
    scoring.check(config, f"{FLAG}={text.path}")
    text = text.sized(config.train.seq_len)
    _check_file(text.path)
    with open_run(config, workdir, step) as (run, state, at):
        tokenizer = scoring.tokenizer_of(run, text.tokenizer)
        tokens_N, size = read(text.path, tokenizer)
        assert isinstance(run.data, TextSource | Mixture), "see scoring.check"
        wider = run.data.of_length(text.window)
        budget.check_evaluation(dataclasses.replace(run, data=wider))
        before = before_text(tokenizer)
        input_N = np.concatenate([before, tokens_N]).astype(np.int32)
        given = len(before) - 1  # targets of the first window that are not of the text
        total, greedy = 0.0, 0
        parts = list(windows(len(input_N) - 1, text.window, text.stride))
        rows = [input_N[part.begin : part.end + 1] for part in parts]
        scored = scoring.Scorer(run, state)(rows, text.window)
        for part, (nats_N, greedy_N) in zip(parts, scored, strict=True):
            new = max(part.new, given) - part.begin
            total += float(nats_N[new:].sum(dtype=np.float64))
            greedy += int(greedy_N[new:].sum())
        leak = run.leak
    loss = total / len(tokens_N)
    if not loss < MOST:
        raise Divergence(f"step {at}: the perplexity of {text.path!r} is not finite")
    return {
        "step": at,
        "split": "text",
        "text": text.path,
        "bytes": size,
        "tokens": len(tokens_N),
        "window": text.window,
        "stride": text.stride,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": total / math.log(2) / size,
        "accuracy": greedy / len(tokens_N),
        "leak": leak,
    }


def _check_file(path: str) -> None:
    """Raises UserError unless the path is a file with something in it."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise UserError(f"{FLAG}: {path!r} is a folder; name one file")
    find_documents(path, FLAG)


def read(path: str, tokenizer: Tokenizer) -> tuple[Integer[np.ndarray, " N"], int]:
    """The tokens of a file, without an opening, and its bytes.

    Raises:
      UserError: it cannot be read, is empty or no text, or the tokenizer cannot encode it.
    """
    documents = find_documents(path, FLAG)
    tokens, size = zip(*encode_documents(documents, tokenizer), strict=True)
    return np.concatenate(tokens)[len(before_documents(tokenizer)) :], sum(size)
