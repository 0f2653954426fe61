"""Token arrays of other programs as a corpus."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from moejax.data.arrays.array import TokenArray
from moejax.data.arrays.scan import Limit, scan
from moejax.data.arrays.sides import Sides, choose_sides
from moejax.data.arrays.streams import UNKNOWN, Stream, find_separator, hold_out, join
from moejax.data.arrays.table import Found
from moejax.data.corpus import Corpus, Facts, Origin
from moejax.data.joined import Sizes, Tokens, TokenSizes
from moejax.data.shards import fingerprint
from moejax.data.split import Split, check_fraction
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
    train, heldout = train.without_last(separator), heldout.without_last(separator)
    train_N, heldout_N = cast(Tokens, train.tokens_N), cast(Tokens, heldout.tokens_N)
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=vocabulary,
        heldout_size_M=_sizes(made_by, separator, heldout_N),
        fingerprint=fingerprint(vocabulary, train_N, heldout_N),
        name=found.name,
        separator=separator,
        facts=Facts(
            split=rule,
            train_documents=train.documents,
            heldout_documents=heldout.documents,
            separator=_spelled(separator, made_by),
            arrays=_in_words(arrays, sides, limit, vocabulary),
        ),
        origin=Origin(Split((), (), rule), made_by) if made_by else None,
        train_start_D=_starts(train, separator),
        heldout_start_D=_starts(heldout, separator),
    )


def _starts(stream: Stream, separator: int) -> np.ndarray | None:
    """Starts of documents with a separator between every two; None for others."""
    return None if separator == UNKNOWN else stream.start_D


def _sizes(tokenizer: Tokenizer | None, separator: int, tokens_N: Tokens) -> Sizes | None:
    """Bytes per token: those that a byte-level tokenizer spells, 1 for a separator, and 0 for a
    token that opens documents beside it. None where they are not known."""
    if tokenizer is None or not tokenizer.is_byte_level:
        return None
    size_V = tokenizer.token_bytes().astype(SIZE)
    size_V[list(tokenizer.opening)] = 0
    if separator != UNKNOWN:
        size_V[separator] = 1
    return cast(Sizes, TokenSizes(tokens_N, size_V))


def _spelled(separator: int, tokenizer: Tokenizer | None) -> str:
    if separator == UNKNOWN:
        return ""
    if tokenizer is None:
        return f"id {separator}"
    return tokenizer.token_text()[separator] or f"id {separator}"


def _in_words(arrays: Sequence[TokenArray], sides: Sides, limit: Limit, vocabulary: int) -> str:
    """Formats and vocabulary, for the lines at the start of a run."""
    counts: dict[str, int] = {}
    for array in arrays:
        counts[array.format] = counts.get(array.format, 0) + 1
    formats = " and ".join(
        form if count == 1 else f"{count} files of {form}" for form, count in counts.items()
    )
    unread = f" ({sides.unread} more are on neither side and not read)" if sides.unread else ""
    source = f"of {limit.field}" if limit.size else "the largest + 1"
    if limit.field == "model.vocab_size" and limit.size:
        source = "as in model.vocab_size"
    return f"token ids, {formats}{unread}; {vocabulary} in the vocabulary, {source}"
