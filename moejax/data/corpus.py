"""A corpus: training and held-out tokens, and the facts needed to interpret losses on them."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int64

from moejax.data.duplicates import Overlap, overlap
from moejax.data.joined import Sizes, Tokens
from moejax.data.split import Split
from moejax.data.token_overlap import token_overlap
from moejax.data.tokenizers.interface import Tokenizer

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
