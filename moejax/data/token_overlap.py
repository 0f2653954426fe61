"""Overlap of the sides of a corpus whose documents are gone: found in its tokens.

Records of compressed files cannot be read again at will; their tokens can, anywhere, and tokenizers
are lossless.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moejax.data.duplicates import (
    MOST_HELDOUT,
    MOST_TRAIN,
    STRETCH,
    WINDOW,
    Overlap,
    shared_windows,
)
from moejax.data.joined import Tokens
from moejax.data.tokenizers.interface import Tokenizer

if TYPE_CHECKING:
    from moejax.data.corpus import Corpus


def token_overlap(corpus: "Corpus", tokenizer: Tokenizer) -> Overlap | None:
    """The overlap of the decoded streams, compared like those of ``duplicates.overlap``.

    Documents are separated by a byte 0 each, which counts as text.
    """
    sizes = corpus.heldout_size_M
    if sizes is None:
        return None
    width = max(float(np.mean(sizes[: 1 << 20])), 1e-9)
    heldout = _texts(corpus.heldout_N, int(MOST_HELDOUT / width), corpus, tokenizer, 0)
    train = _texts(corpus.train_N, int(MOST_TRAIN / width), corpus, tokenizer, WINDOW - 1)
    complete = len(corpus.heldout_N) * width <= MOST_HELDOUT
    complete &= len(corpus.train_N) * width <= MOST_TRAIN
    found = shared_windows(train, (text for text, _ in heldout), -1)
    return Overlap(found.share, WINDOW, found.train_bytes, found.heldout_bytes, complete)


def _texts(
    token_N: Tokens, most: int, corpus: "Corpus", tokenizer: Tokenizer, beyond: int
) -> Iterator[tuple[np.ndarray, int]]:
    """At most ``most`` tokens in evenly spread stretches, as bytes, each with the size of its own
    tokens: see ``duplicates``."""
    share = min(most / len(token_N), 1.0)
    passed = taken = 0
    for begin in range(0, len(token_N), STRETCH):
        own = min(STRETCH, len(token_N) - begin)
        if taken <= share * passed:
            taken += own
            stretch = token_N[begin : begin + own + beyond]
            text = _decoded(stretch, corpus, tokenizer)
            yield np.frombuffer(text, np.uint8), len(text) * own // len(stretch)
        passed += own


def _decoded(token_N: np.ndarray, corpus: "Corpus", tokenizer: Tokenizer) -> bytes:
    if tokenizer.vocab_size == 256:
        return np.ascontiguousarray(token_N, np.uint8).tobytes()
    outside = np.isin(token_N, (corpus.separator, *corpus.opening))
    ends = np.flatnonzero(np.diff(np.r_[True, outside, True].astype(np.int8)))
    texts = (
        tokenizer.decode(token_N[a:b].tolist()).encode()
        for a, b in zip(ends[::2], ends[1::2], strict=True)
    )
    return b"\0".join(texts)
