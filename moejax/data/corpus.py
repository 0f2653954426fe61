"""A corpus: training and held-out tokens, and the facts needed to interpret losses on them."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from jaxtyping import UInt

from moejax.data.census import Census
from moejax.data.duplicates import Overlap, overlap
from moejax.data.shards import fingerprint, is_prepared, read_shards
from moejax.data.split import Split, Text, open_text
from moejax.data.tokenizer import Tokenizer, encode_documents, encode_sized, load_tokenizer
from moejax.errors import UserError

COUNTED = 2**25
"""Most tokens that ``Corpus.token_counts`` counts."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The documents and the tokenizer that a corpus's tokens were made from."""

    split: Split
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
      warning: a warning about documents that do not look like text; empty if all do.
    """

    split: str = ""
    train_documents: int = 0
    heldout_documents: int = 0
    unread_documents: int = 0
    copies: int = 0
    separator: str = ""
    warning: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams, each the documents of one side of the split joined by `separator`.

    Attributes:
      train_N, heldout_N: token ids, uint16 (vocabularies up to 65536) or uint32.
      vocab_size: ids are below it.
      heldout_size_M: bytes of text that each held-out token encodes, 1 for a separator; `x` nats
        on some targets are `x / ln 2 / (the sum of their sizes)` bits per byte. None for shards of
        an older version, which do not record it.
      fingerprint: SHA-256 over vocabulary size and tokens; equal means the same data.
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      separator: the token between two documents.
      facts: further facts about the text.
      origin: documents and tokenizer; None if the tokens came from prepared shards.
      known_overlap: overlap of the sides of prepared shards, computed when they were made.
    """

    train_N: UInt[np.ndarray, " N"]
    heldout_N: UInt[np.ndarray, " M"]
    vocab_size: int
    heldout_size_M: UInt[np.ndarray, " M"] | None
    fingerprint: str
    name: str
    separator: int
    facts: Facts = Facts()
    origin: Origin | None = None
    known_overlap: Overlap | None = None

    @functools.cached_property
    def overlap(self) -> Overlap | None:
        """Overlap of the held-out with the training text; None if it is not known."""
        if self.origin is None:
            return self.known_overlap
        return overlap(self.origin.split.train, self.origin.split.heldout)

    def token_counts(self, vocab_size: int = 0) -> np.ndarray:
        """Occurrences of each token in the first 2^25 tokens of the training text, int64[V]."""
        size, chunk = max(vocab_size, self.vocab_size), 2**20
        parts = (self.train_N[start : start + chunk] for start in range(0, COUNTED, chunk))
        return sum((np.bincount(part, minlength=size) for part in parts), np.zeros(size, np.int64))


def load(data_cfg: Any) -> Corpus:
    """The corpus named in the `data` section of a config."""
    return load_corpus(
        data_cfg.path,
        data_cfg.tokenizer,
        data_cfg.eval_fraction,
        data_cfg.eval_path,
        data_cfg.split,
    )


def load_corpus(
    path: str = "",
    tokenizer: str = "",
    eval_fraction: float = 0.05,
    eval_path: str = "",
    unit: str = "bytes",
) -> Corpus:
    """Load text and tokenise it, or map shards made by `moejax data prepare`.

    Args:
      path: a file or folder of text; a folder of prepared shards, which have their own tokenizer
        and split; or empty for the built-in corpus.
      tokenizer: a Hugging Face `tokenizers` JSON file; empty for bytes as tokens.
      eval_fraction: share of the text to hold out, in (0, 1).
      eval_path: a file or folder of text to hold out instead.
      unit: unit of the share, see `open_text`.

    Raises UserError, naming the field and the path, for missing or damaged data.
    """
    folder = os.path.expanduser(path)
    if path and is_prepared(folder):
        for field, value in (("tokenizer", tokenizer), ("eval_path", eval_path)):
            if value:
                raise UserError(
                    f"data.{field}: {path!r} already holds tokens; leave data.{field} empty or "
                    "name the original text in data.path"
                )
        return _load_prepared(folder)
    text = open_text(path, eval_fraction, eval_path, unit)
    origin = Origin(text.split, load_tokenizer(tokenizer))
    census = Census()
    train_N, _ = _joined(encode_documents(origin.split.train, origin.tokenizer, census))
    heldout_N, heldout_size_M = _joined(
        encode_sized(origin.split.heldout, origin.tokenizer, census)
    )
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=origin.tokenizer.vocab_size,
        heldout_size_M=heldout_size_M,
        fingerprint=fingerprint(origin.tokenizer.vocab_size, train_N, heldout_N),
        name=text.name,
        separator=origin.tokenizer.separator,
        facts=facts_of(text, origin.tokenizer, census),
        origin=origin,
    )


def facts_of(text: Text, tokenizer: Tokenizer, census: Census) -> Facts:
    split = text.split
    return Facts(
        split=split.rule,
        train_documents=len(split.train),
        heldout_documents=len(split.heldout),
        unread_documents=split.unread,
        copies=text.copies,
        separator=tokenizer.separator_token,
        warning=census.warning(),
    )


def _joined(parts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their sizes, each joined to one array."""
    tokens, sizes = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate([np.atleast_1d(size) for size in sizes])


def _load_prepared(folder: str) -> Corpus:
    shards = read_shards(folder)
    index = shards.index
    return Corpus(
        train_N=shards.train_N,
        heldout_N=shards.heldout_N,
        vocab_size=index.vocab_size,
        heldout_size_M=shards.heldout_size_M,
        fingerprint=index.fingerprint,
        name=index.source,
        separator=index.separator,
        facts=Facts(**index.facts),
        known_overlap=Overlap(**index.overlap) if index.overlap else None,
    )
