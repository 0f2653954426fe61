"""A corpus: training and held-out tokens with what is needed to interpret losses on them."""

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import UInt

from moejax.data.builtin import builtin_documents, builtin_name
from moejax.data.documents import Split, find_documents, split_documents
from moejax.data.shards import fingerprint, is_prepared, read_shards
from moejax.data.tokenizer import Tokenizer, encode_documents, load_tokenizer
from moejax.errors import UserError

COUNTED = 2**25
"""Tokens that ``Corpus.token_counts`` looks at."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The documents and the tokenizer that a corpus's tokens were made from."""

    split: Split
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams, each the documents of one side of the split joined by `separator`.

    Attributes:
      train_N, heldout_N: token ids, uint16 (vocabularies up to 65536) or uint32.
      vocab_size: ids are below it.
      heldout_bytes_per_token: bytes of held-out text per held-out token, separators counted as one
        byte each; `x` nats per token are `x / ln 2 / heldout_bytes_per_token` bits per byte.
      fingerprint: SHA-256 over vocabulary size and tokens; equal means the same data.
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      separator: the token between two documents.
      origin: documents and tokenizer; None where the tokens came from prepared shards.
    """

    train_N: UInt[np.ndarray, " N"]
    heldout_N: UInt[np.ndarray, " M"]
    vocab_size: int
    heldout_bytes_per_token: float
    fingerprint: str
    name: str
    separator: int
    origin: Origin | None = None

    def token_counts(self, vocab_size: int = 0) -> np.ndarray:
        """Occurrences of each token in (the first 2^25 tokens of) the training text, int64[V]."""
        size, chunk = max(vocab_size, self.vocab_size), 2**20
        parts = (self.train_N[start : start + chunk] for start in range(0, COUNTED, chunk))
        return sum((np.bincount(part, minlength=size) for part in parts), np.zeros(size, np.int64))


def load(data_cfg: Any) -> Corpus:
    """The corpus that a config's `data` section names: its `path`, `tokenizer`, `eval_fraction`."""
    return load_corpus(data_cfg.path, data_cfg.tokenizer, data_cfg.eval_fraction)


def load_corpus(path: str = "", tokenizer: str = "", eval_fraction: float = 0.05) -> Corpus:
    """Loads text and tokenises it, or maps shards made by `moejax data prepare`.

    Args:
      path: a file or folder of text; a folder of prepared shards, whose own tokenizer and split
        then hold; or empty for the built-in corpus.
      tokenizer: a Hugging Face `tokenizers` JSON file; empty for bytes as tokens.
      eval_fraction: share of the files to hold out, in (0, 1).

    Raises UserError, naming the field and the path, if there is nothing to read or it is damaged.
    """
    folder = os.path.expanduser(path)
    if path and is_prepared(folder):
        if tokenizer:
            raise UserError(
                f"data.tokenizer: {path!r} already holds tokens; leave data.tokenizer empty or "
                "name the original text in data.path"
            )
        return _load_prepared(folder)
    name, origin = open_text(path, tokenizer, eval_fraction)
    train_N, _ = _tokenise(origin.split.train, origin.tokenizer)
    heldout_N, heldout_bytes = _tokenise(origin.split.heldout, origin.tokenizer)
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=origin.tokenizer.vocab_size,
        heldout_bytes_per_token=heldout_bytes / len(heldout_N),
        fingerprint=fingerprint(origin.tokenizer.vocab_size, train_N, heldout_N),
        name=name,
        separator=origin.tokenizer.separator,
        origin=origin,
    )


def open_text(path: str, tokenizer: str, eval_fraction: float) -> tuple[str, Origin]:
    """Name, split and tokenizer of the text at `path` (empty: built-in), before tokenising."""
    documents = find_documents(path) if path else builtin_documents()
    name = os.path.basename(os.path.abspath(os.path.expanduser(path))) if path else builtin_name()
    return name, Origin(split_documents(documents, eval_fraction), load_tokenizer(tokenizer))


def _tokenise(documents: Any, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """The whole token stream of some documents, and how many bytes it stands for."""
    parts = list(encode_documents(documents, tokenizer))
    return np.concatenate([tokens for tokens, _ in parts]), sum(size for _, size in parts)


def _load_prepared(folder: str) -> Corpus:
    index, train_N, heldout_N = read_shards(folder)
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=index.vocab_size,
        heldout_bytes_per_token=index.heldout_bytes_per_token,
        fingerprint=index.fingerprint,
        name=index.source,
        separator=index.separator,
    )
