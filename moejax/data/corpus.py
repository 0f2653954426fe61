"""A corpus: training and held-out tokens with what is needed to interpret losses on them."""

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
"""Tokens that ``Corpus.token_counts`` looks at."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The documents and the tokenizer that a corpus's tokens were made from."""

    split: Split
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Facts:
    """What there is to know of the text besides its tokens.

    Attributes:
      split: how the held-out side was chosen, in words.
      train_documents, heldout_documents, unread_documents: on the two sides, and on neither.
      copies: near copies that were left out before the split.
      separator: the token between two documents, as its tokenizer spells it.
      warning: what does not look like text; empty if everything does.
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
      heldout_size_M: bytes of text that each held-out token stands for, a separator for one; `x`
        nats of some targets are `x / ln 2 / (the sum of their sizes)` bits per byte. None where
        shards of an older version do not say.
      fingerprint: SHA-256 over vocabulary size and tokens; equal means the same data.
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      separator: the token between two documents.
      facts: what else is known of the text.
      origin: documents and tokenizer; None where the tokens came from prepared shards.
      known_overlap: of prepared shards, as it was when they were made.
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
        """What the held-out text shares with the training text; None if it is not known."""
        if self.origin is None:
            return self.known_overlap
        return overlap(self.origin.split.train, self.origin.split.heldout)

    def token_counts(self, vocab_size: int = 0) -> np.ndarray:
        """Occurrences of each token in (the first 2^25 tokens of) the training text, int64[V]."""
        size, chunk = max(vocab_size, self.vocab_size), 2**20
        parts = (self.train_N[start : start + chunk] for start in range(0, COUNTED, chunk))
        return sum((np.bincount(part, minlength=size) for part in parts), np.zeros(size, np.int64))


def load(data_cfg: Any) -> Corpus:
    """The corpus that a config's `data` section names."""
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
    """Loads text and tokenises it, or maps shards made by `moejax data prepare`.

    Args:
      path: a file or folder of text; a folder of prepared shards, whose own tokenizer and split
        then hold; or empty for the built-in corpus.
      tokenizer: a Hugging Face `tokenizers` JSON file; empty for bytes as tokens.
      eval_fraction: share of the text to hold out, in (0, 1).
      eval_path: a file or folder of text to hold out instead.
      unit: what the share is of; see `open_text`.

    Raises UserError, naming the field and the path, if there is nothing to read or it is damaged.
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
    made = Origin(text.split, load_tokenizer(tokenizer))
    census = Census()
    train_N, _ = _joined(encode_documents(made.split.train, made.tokenizer, census))
    heldout_N, heldout_size_M = _joined(encode_sized(made.split.heldout, made.tokenizer, census))
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=made.tokenizer.vocab_size,
        heldout_size_M=heldout_size_M,
        fingerprint=fingerprint(made.tokenizer.vocab_size, train_N, heldout_N),
        name=text.name,
        separator=made.tokenizer.separator,
        facts=facts_of(text, made.tokenizer, census),
        origin=made,
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
    """Tokens and what comes with them, each as one array."""
    tokens, sizes = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate([np.atleast_1d(size) for size in sizes])


def _load_prepared(folder: str) -> Corpus:
    found = read_shards(folder)
    index = found.index
    return Corpus(
        train_N=found.train_N,
        heldout_N=found.heldout_N,
        vocab_size=index.vocab_size,
        heldout_size_M=found.heldout_size_M,
        fingerprint=index.fingerprint,
        name=index.source,
        separator=index.separator,
        facts=Facts(**index.facts),
        known_overlap=Overlap(**index.overlap) if index.overlap else None,
    )
