"""Token arrays of other programs as a corpus."""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np

from moejax.data.arrays.array import TokenArray
from moejax.data.arrays.scan import Limit, scan
from moejax.data.arrays.sides import choose_sides
from moejax.data.arrays.streams import UNKNOWN, Stream, find_separator, hold_out, join
from moejax.data.arrays.table import Found
from moejax.data.corpus import Corpus, Facts, Origin
from moejax.data.joined import Sizes, Tokens, TokenSizes
from moejax.data.shards import fingerprint
from moejax.data.split import check_fraction
from moejax.data.tokenizers.interface import SIZE, Tokenizer, token_dtype
from moejax.data.tokenizers.load import load_tokenizer


def load_arrays(
    found: Found,
    tokenizer: str = "",
    eval_fraction: float = 0.05,
    eval_path: str = "",
    vocab_size: int = 0,
) -> Corpus:
    """The corpus of token arrays, memory-mapped; every id is read once and checked.

    Args:
      found: the arrays of ``data.path``.
      tokenizer: the tokenizer that made the ids; empty if it is not at hand. With it, the bytes of
        tokens are known (if it is byte level), and documents end at its separator.
      eval_fraction: share of the tokens to hold out, at the end.
      eval_path: arrays to hold out instead.
      vocab_size: ids are below it, where no tokenizer is named; 0: the largest id + 1.

    Raises UserError for a damaged file and for an id outside the vocabulary.
    """
    check_fraction(eval_fraction)
    sides = choose_sides(found, eval_path)
    made_by = load_tokenizer(tokenizer) if tokenizer else None
    limit = Limit(vocab_size, "model.vocab_size")
    if made_by:
        limit = Limit(made_by.vocab_size, f"data.tokenizer={tokenizer!r}")
    candidates = [made_by.separator, *made_by.opening[:1]] if made_by else []
    arrays = [file.read(limit.size) for file in (*sides.train, *sides.heldout)]
    scans = [scan(array, limit, candidates) for array in arrays]
    vocabulary = limit.size or max(scan.largest for scan in scans) + 1
    separator = find_separator(arrays, scans, candidates)
    middle = len(sides.train)
    train, heldout = (
        join(arrays[side], scans[side], separator, token_dtype(vocabulary))
        for side in (slice(middle), slice(middle, None))
    )
    rule = sides.rule
    if not sides.heldout:
        train, heldout, rule = hold_out(train, eval_fraction)
    opening = _opening(made_by, separator, train, heldout)
    train, heldout = train.without_last(separator), heldout.without_last(separator)
    train_N, heldout_N = cast(Tokens, train.tokens_N), cast(Tokens, heldout.tokens_N)
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=vocabulary,
        heldout_size_M=_sizes(made_by, separator, opening, heldout_N),
        fingerprint=fingerprint(vocabulary, train_N, heldout_N),
        name=found.name,
        separator=separator,
        opening=opening,
        train_start_D=_starts(train, separator),
        heldout_start_D=_starts(heldout, separator),
        facts=Facts(
            split=rule,
            train_documents=train.documents,
            heldout_documents=heldout.documents,
            separator=_spelled(separator, made_by),
            opening="".join(_spelled(token, made_by) for token in opening),
            formats=dict(Counter(array.format for array in arrays)),
            arrays=_in_words(arrays, limit, vocabulary),
        ),
        origin=Origin(None, made_by) if made_by else None,
    )


def _starts(stream: Stream, separator: int) -> np.ndarray | None:
    """Starts of documents with a separator between every two; None for others."""
    return None if separator == UNKNOWN else stream.start_D


def _opening(
    tokenizer: Tokenizer | None, separator: int, train: Stream, heldout: Stream
) -> tuple[int, ...]:
    """The tokenizer's own opening, if it is one token and begins the documents of both sides."""
    opening = tuple(tokenizer.opening) if tokenizer else ()
    if len(opening) != 1 or separator in (UNKNOWN, *opening):
        return ()
    return opening if train.opens_with(opening[0]) and heldout.opens_with(opening[0]) else ()


def _sizes(
    tokenizer: Tokenizer | None, separator: int, opening: tuple[int, ...], tokens_N: Tokens
) -> Sizes | None:
    """Bytes per token as a byte-level tokenizer spells them, but 1 for a separator and 0 for an
    opening. None where they are not known."""
    if tokenizer is None or not tokenizer.is_byte_level:
        return None
    size_V = tokenizer.token_bytes().astype(SIZE)
    size_V[list(opening)] = 0
    if separator != UNKNOWN:
        size_V[separator] = 1
    return cast(Sizes, TokenSizes(tokens_N, size_V))


def _spelled(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as its tokenizer spells it."""
    if token == UNKNOWN:
        return ""
    return tokenizer.token_text()[token] if tokenizer else f"id {token}"


def _in_words(arrays: Sequence[TokenArray], limit: Limit, size: int) -> str:
    """Formats and vocabulary, for the lines at the start of a run."""
    counts = Counter(array.format for array in arrays)
    formats = " and ".join(
        name if count == 1 else f"{count} files of {name}" for name, count in counts.items()
    )
    source = limit.field if limit.size else "the largest + 1"
    return f"{formats}; a vocabulary of {size} ids ({source})"
