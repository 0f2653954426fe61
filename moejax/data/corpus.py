"""A corpus: training and held-out tokens, and the facts needed to interpret losses on them."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from moejax.data.arrays.table import find_arrays
from moejax.data.assemble import Choice, Listed, choose, size_parts, starts, token_parts
from moejax.data.census import Census
from moejax.data.duplicates import Overlap, overlap
from moejax.data.encode import Encoded, Reading, Troubles, encode_unit
from moejax.data.joined import Sizes, Tokens
from moejax.data.shards import Shards, fingerprint, is_prepared, read_shards
from moejax.data.split import Split
from moejax.data.token_overlap import token_overlap
from moejax.data.tokenizers.interface import SIZE, Tokenizer, joints
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.units import Texts, open_texts
from moejax.errors import UserError

COUNTED = 2**25
"""Most tokens that ``Corpus.token_counts`` counts."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The documents and the tokenizer that a corpus's tokens were made from."""

    split: Split | None
    """None if they are records of files."""
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about the text besides its tokens.

    Attributes:
      split: the rule that chose the held-out side, in words.
      train_documents, heldout_documents, unread_documents: numbers of documents on the two sides,
        and on neither.
      copies: number of near copies left out before the split.
      separator: the token between two documents, as the tokenizer spells it.
      opening: the tokens before each document, as the tokenizer spells them.
      formats: number of files of each format, by its name.
      duplicates: number of documents left out as exact copies of others.
      empty_documents, bad_records: documents without text, and records that cannot be read, left
        out; the first of the latter, with the reason.
      warning: a warning about documents that do not look like text; empty if all do.
      arrays: formats and vocabulary of token arrays of other programs, in words; empty for text.
    """

    split: str = ""
    train_documents: int = 0
    heldout_documents: int = 0
    unread_documents: int = 0
    copies: int = 0
    separator: str = ""
    opening: str = ""
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    duplicates: int = 0
    empty_documents: int = 0
    bad_records: int = 0
    first_bad_record: str = ""
    warning: str = ""
    arrays: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams, each the documents of one side of the split joined by `separator`, with
    `opening` before each.

    Attributes:
      train_N, heldout_N: token ids, uint16 (vocabularies up to 65536) or uint32.
      vocab_size: ids are below it.
      heldout_size_M: bytes of text that each held-out token encodes, 1 for a separator and 0
        for an opening; `x` nats on some targets are `x / ln 2 / (the sum of their sizes)` bits per
        byte. None for shards of an older version, which do not record it, and for token arrays
        without their tokenizer.
      fingerprint: SHA-256 over vocabulary size and tokens; equal means the same data.
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      separator: the token between two documents; -1 if it is not known.
      opening: the tokens before each document.
      train_start_D, heldout_start_D: positions of the documents in the streams, each behind the
        separator of the document before; None if they are not known.
      facts: further facts about the text.
      origin: documents and tokenizer; None if the tokens came from prepared shards. Token arrays
        of other programs have no documents there.
      known_overlap: overlap of the sides of prepared shards, computed when they were made.
    """

    train_N: Tokens
    heldout_N: Tokens
    vocab_size: int
    heldout_size_M: Sizes | None
    fingerprint: str
    name: str
    separator: int
    facts: Facts = Facts()
    origin: Origin | None = None
    known_overlap: Overlap | None = None
    opening: tuple[int, ...] = ()
    train_start_D: Int64[np.ndarray, " D"] | None = None
    heldout_start_D: Int64[np.ndarray, " E"] | None = None

    @functools.cached_property
    def overlap(self) -> Overlap | None:
        """Overlap of the held-out with the training text; None if it is not known."""
        if self.origin is None:
            return self.known_overlap
        split = self.origin.split
        if split is None:
            return token_overlap(self, self.origin.tokenizer)
        # Streams and token arrays have no documents.
        return overlap(split.train, split.heldout) if split.heldout else None

    def token_counts(self, vocab_size: int = 0) -> np.ndarray:
        """Occurrences of each token in the first 2^25 tokens of the training text, int64[V]."""
        size, chunk = max(vocab_size, self.vocab_size), 2**20
        parts = (self.train_N[start : start + chunk] for start in range(0, COUNTED, chunk))
        return sum((np.bincount(part, minlength=size) for part in parts), np.zeros(size, np.int64))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to make of a text; each is a field of the section ``data`` of a config."""

    path: str = ""
    tokenizer: str = ""
    eval_fraction: float = 0.05
    eval_path: str = ""
    split: str = "bytes"
    text_field: str = "text"
    bos: str = "auto"
    duplicates: str = "drop"
    on_error: str = "fail"

    def texts(self) -> Texts:
        """The documents, before they are read."""
        return open_texts(self.path, self.eval_fraction, self.eval_path, self.split)

    @property
    def reading(self) -> Reading:
        return Reading(self.text_field, self.on_error)


def load(data_cfg: Any, vocab_size: int = 0) -> Corpus:
    """The corpus named in the `data` section of a config; `vocab_size` as in `load_corpus`."""
    names = (field.name for field in dataclasses.fields(Wanted))
    fields = {name: getattr(data_cfg, name) for name in names}
    return load_corpus(**fields, vocab_size=vocab_size)


def load_corpus(
    path: str = "",
    tokenizer: str = "",
    eval_fraction: float = 0.05,
    eval_path: str = "",
    vocab_size: int = 0,
    **others: Any,
) -> Corpus:
    """Load text and tokenise it, or map shards made by `moejax data prepare` or token arrays.

    Args:
      path: files of text or of records (see ``units``); a folder of prepared shards, which have
        their own tokenizer and split; token arrays of other programs; or empty for the built-in
        corpus.
      tokenizer: see `load_tokenizer`; empty for bytes as tokens.
      eval_fraction: share of the text to hold out, in (0, 1).
      eval_path: files to hold out instead.
      vocab_size: the vocabulary of token arrays without a tokenizer; 0: the largest id + 1.
      others: further fields of ``Wanted``, as in the section `data` of a config.

    Raises UserError, naming the field and the path, for missing or damaged data.
    """
    wanted = Wanted(path, tokenizer, eval_fraction, eval_path, **others)
    folder = os.path.expanduser(path)
    if path and is_prepared(folder):
        for field in ("tokenizer", "eval_path"):
            if getattr(wanted, field):
                raise UserError(
                    f"data.{field}: {path!r} already holds tokens; leave data.{field} empty or "
                    "name the original text in data.path"
                )
        return corpus_of_shards(read_shards(folder))
    if path and (arrays := find_arrays(path)):
        from moejax.data.arrays.load import load_arrays  # which builds on this module

        return load_arrays(arrays, tokenizer, eval_fraction, eval_path, vocab_size)
    texts, loaded = wanted.texts(), load_tokenizer(tokenizer, wanted.bos)
    chunks = [chunk for unit in texts.units for chunk in encode_unit(unit, loaded, wanted.reading)]
    listed = Listed.of(chunks)
    choice = choose(listed, texts.share, texts.count, wanted.duplicates == "drop")
    first, between = joints(loaded)
    train_N, heldout_N = (
        np.concatenate(list(token_parts(chunks, kept_D, between.tokens)))
        for kept_D in (choice.train_D, choice.heldout_D)
    )
    sizes = size_parts(chunks, choice.heldout_D, between.sizes, size_table(loaded))
    lead = len(between.tokens)
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=loaded.vocab_size,
        heldout_size_M=np.concatenate(list(sizes)),
        fingerprint=fingerprint(loaded.vocab_size, train_N, heldout_N),
        name=texts.name,
        separator=loaded.separator,
        opening=first.tokens,
        train_start_D=starts(listed.length_D[choice.train_D], lead),
        heldout_start_D=starts(listed.length_D[choice.heldout_D], lead),
        facts=facts_of(texts, loaded, choice, chunks),
        origin=Origin(kept_split(texts.split, choice), loaded),
    )


def size_table(tokenizer: Tokenizer) -> UInt[np.ndarray, " V"] | None:
    """Bytes of each token id; None unless the tokenizer is byte-level."""
    return tokenizer.token_bytes().astype(SIZE) if tokenizer.is_byte_level else None


def facts_of(
    texts: Texts, tokenizer: Tokenizer, choice: Choice, chunks: Iterable[Encoded]
) -> Facts:
    """The facts about a text that was read in chunks."""
    census, troubles = Census(), Troubles()
    for chunk in chunks:
        census.join(chunk.census)
        troubles.join(chunk.troubles)
    return Facts(
        split=texts.rule,
        train_documents=int(np.sum(choice.train_D)),
        heldout_documents=int(np.sum(choice.heldout_D)),
        unread_documents=texts.unread,
        copies=texts.copies,
        separator=tokenizer.separator_token,
        opening=tokenizer.decode(joints(tokenizer)[0].tokens),
        warning=census.warning(),
        formats=texts.kinds,
        duplicates=choice.copies,
        empty_documents=troubles.empty,
        bad_records=troubles.bad,
        first_bad_record=troubles.first_bad,
    )


def kept_split(split: Split | None, choice: Choice) -> Split | None:
    """The documents of plain text that were kept; None for records."""
    if split is None:
        return None
    train = tuple(itertools.compress(split.train, choice.train_D[: len(split.train)]))
    heldout = tuple(itertools.compress(split.heldout, choice.heldout_D[len(split.train) :]))
    return dataclasses.replace(split, train=train, heldout=heldout)


def corpus_of_shards(shards: Shards) -> Corpus:
    """The corpus of prepared shards, memory-mapped."""
    index = shards.index
    return Corpus(
        train_N=shards.train_N,
        heldout_N=shards.heldout_N,
        vocab_size=index.vocab_size,
        heldout_size_M=shards.heldout_size_M,
        fingerprint=index.fingerprint,
        name=index.source,
        separator=index.separator,
        opening=tuple(index.opening),
        train_start_D=shards.train_start_D,
        heldout_start_D=shards.heldout_start_D,
        facts=Facts(**index.facts),
        known_overlap=Overlap(**index.overlap) if index.overlap else None,
    )
