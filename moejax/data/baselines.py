"""Held-out loss of bigram and trigram models, which a network must beat to have learned anything.

The loss is computed on the targets of an evaluation, each predicted from the network's own input:
the tokens before it in its row, in packed rows those of its own document.

Interpolated Witten-Bell smoothing (Bell, Cleary, Witten 1990, "Text Compression", method C; Chen
and Goodman 1999, section 2.4). With c(h) occurrences of the context h and t(h) distinct tokens
after it,

    p(w | h) = (c(h, w) + t(h) p(w | h')) / (c(h) + t(h)),

where h' drops the oldest token of h, the empty context backs off to the uniform distribution over
the vocabulary, and an unseen context uses p(w | h') unchanged. Each p(. | h) sums to one.
"""

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Integer

from moejax.data.joined import Tokens

_MAX_VOCAB = 1 << 21  # three ids fit in 63 bits


@dataclasses.dataclass(frozen=True)
class _Order:
    """Counts of n-grams (context, then token) and contexts of one order, with sorted keys."""

    gram_keys: np.ndarray
    gram_counts: np.ndarray
    context_keys: np.ndarray
    context_counts: np.ndarray
    context_types: np.ndarray  # distinct tokens after the context


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """An interpolated Witten-Bell model; `orders[n]` conditions on n previous tokens."""

    vocab_size: int
    orders: tuple[_Order, ...]

    def log_probs(
        self,
        tokens_N: Integer[np.ndarray, "*N"],
        known_N: Integer[np.ndarray, "*N"] | None = None,
    ) -> tuple[Float[np.ndarray, "*N"], ...]:
        """Natural log-probability of each token given the tokens before it, for every order.

        Element n uses at most n previous tokens along the last axis, fewer at the beginning, and at
        most ``known_N`` of them.
        """
        probability = np.full(tokens_N.shape, 1.0 / self.vocab_size)
        result = []
        for n, order in enumerate(self.orders):
            probability = probability.copy()
            if tokens_N.shape[-1] > n:
                keys = _keys(tokens_N, self.vocab_size, n)
                lower = probability[..., n:]
                higher = _interpolate(order, keys, self.vocab_size, lower)
                if known_N is not None:
                    higher = np.where(known_N[..., n:] >= n, higher, lower)
                probability[..., n:] = higher
            result.append(np.log(probability))
        return tuple(result)


def fit_ngrams(tokens_N: Integer[np.ndarray, " N"], vocab_size: int, context: int) -> NgramModel:
    """Count n-grams with up to `context` (0, 1 or 2) previous tokens."""
    if not 0 <= context <= 2 or not 1 <= vocab_size <= _MAX_VOCAB:
        raise ValueError(f"context {context}, vocab_size {vocab_size}: out of range")
    orders = (_count(tokens_N, vocab_size, n) for n in range(context + 1))
    return NgramModel(vocab_size, tuple(orders))


def _keys(tokens_N: np.ndarray, vocab_size: int, context: int) -> np.ndarray:
    """One integer per n-gram; divided by the vocabulary size it is the key of the context."""
    dtype = (
        np.uint32 if vocab_size ** (context + 1) <= 1 << 32 else np.uint64
    )  # narrow sorts faster
    length = tokens_N.shape[-1] - context
    keys = np.zeros((*tokens_N.shape[:-1], length), dtype=dtype)
    for i in range(context + 1):
        keys *= dtype(vocab_size)
        keys += tokens_N[..., i : i + length].astype(dtype)
    return keys


def _count(tokens_N: np.ndarray, vocab_size: int, context: int) -> _Order:
    keys, counts = np.unique(_keys(tokens_N, vocab_size, context), return_counts=True)
    contexts, first, types = np.unique(keys // vocab_size, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first) if len(first) else np.zeros(0, counts.dtype)
    return _Order(keys, counts, contexts, totals, types)


def _look_up(table: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` of the keys in the sorted `table`; 0 for keys that are not in it."""
    if len(table) == 0:
        return np.zeros(keys.shape, dtype=np.int64)
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)


def _interpolate(order: _Order, keys: np.ndarray, vocab_size: int, lower: np.ndarray) -> np.ndarray:
    contexts = keys // vocab_size
    count = _look_up(order.gram_keys, keys, order.gram_counts)
    total = _look_up(order.context_keys, contexts, order.context_counts)
    types = _look_up(order.context_keys, contexts, order.context_types)
    known = total > 0
    return np.where(known, (count + types * lower) / np.where(known, total + types, 1), lower)


def ngram_baselines(
    train_N: Tokens,
    rows: Iterable[Integer[np.ndarray, "_ L1"]],
    vocab_size: int,
    known: Iterable[Integer[np.ndarray, "_ L"]] | None = None,
    *,
    max_train: int = 20_000_000,
) -> dict[str, float]:
    """Loss in nats per token of a bigram and a trigram model fitted on `train_N`.

    `rows` are the batches of rows of an evaluation: every token except the first of a row is a
    target. For packed rows, `known` has the number of tokens that each of these targets may be
    predicted from, those before it in its document, and 0 for no target. If the training text is
    longer than `max_train` tokens, n-grams are counted on about that many, in 64 evenly spread
    stretches.
    """
    model = fit_ngrams(_spread(train_N, max_train), vocab_size, context=2)
    sums, targets = np.zeros(2), 0
    knowns = itertools.repeat(None) if known is None else known
    for row_BL, known_BL in zip(rows, knowns, strict=known is not None):
        if known_BL is not None:
            known_BL = np.pad(known_BL, ((0, 0), (1, 0)))
        _, bigram_BL, trigram_BL = model.log_probs(row_BL, known_BL)
        scored = np.s_[:, 1:] if known_BL is None else known_BL > 0
        sums += [bigram_BL[scored].sum(), trigram_BL[scored].sum()]
        targets += bigram_BL[scored].size
    bigram, trigram = -sums / targets
    return {"bigram": float(bigram), "trigram": float(trigram)}


def _spread(tokens_N: Tokens, limit: int, stretches: int = 64) -> np.ndarray:
    """All tokens, or about `limit` of them in evenly spread stretches, joined."""
    if len(tokens_N) <= limit:
        return tokens_N[:]  # an array, also where tokens_N is several files
    size = -(-limit // stretches)
    begins = [i * (len(tokens_N) - size) // (stretches - 1) for i in range(stretches)]
    return np.concatenate([tokens_N[begin : begin + size] for begin in begins])
