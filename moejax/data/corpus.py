"""A corpus: training and held-out tokens, and the facts needed to interpret losses on them."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt

from moejax.data.census import Census
from moejax.data.duplicates import Overlap, overlap
from moejax.data.assemble import Choice, Listed, choose, joined, starts
from moejax.data.encode import Encoded, Reading, Troubles, encode_unit
from moejax.data.shards import fingerprint, is_prepared, read_shards
from moejax.data.split import Split
from moejax.data.tokenizers.interface import SIZE, Joint, Tokenizer, joints
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


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Two token streams, each the documents of one side of the split joined by `separator`, with
    `opening` before each.

    Attributes:
      train_N, heldout_N: token ids, uint16 (vocabularies up to 65536) or uint32.
      vocab_size: ids are below it.
      heldout_size_M: bytes of text that each held-out token encodes, 1 for a separator and 0
        for an opening; `x` nats on some targets are `x / ln 2 / (the sum of their sizes)` bits per
        byte. None for shards of an older version, which do not record it.
      fingerprint: SHA-256 over vocabulary size and tokens; equal means the same data.
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      separator: the token between two documents.
      opening: the tokens before each document.
      train_start_D, heldout_start_D: positions of the documents in the streams, each behind the
        separator of the document before; None if they are not known.
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
    opening: tuple[int, ...] = ()
    train_start_D: Int64[np.ndarray, " D"] | None = None
    heldout_start_D: Int64[np.ndarray, " E"] | None = None

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


def load(data_cfg: Any) -> Corpus:
    """The corpus named in the `data` section of a config."""
    names = (field.name for field in dataclasses.fields(Wanted))
    return load_corpus(**{name: data_cfg[name] for name in names})


def load_corpus(path: str = "", tokenizer: str = "", **others: Any) -> Corpus:
    """Load text and tokenise it, or map shards made by `moejax data prepare`.

    Args:
      path: files of text or of records (see ``units``); a folder of prepared shards, which have
        their own tokenizer and split; or empty for the built-in corpus.
      tokenizer: see `load_tokenizer`; empty for bytes as tokens.
      others: further fields of ``Wanted``, as in the section `data` of a config.

    Raises UserError, naming the field and the path, for missing or damaged data.
    """
    wanted = Wanted(path, tokenizer, **others)
    folder = os.path.expanduser(path)
    if path and is_prepared(folder):
        for field in ("tokenizer", "eval_path"):
            if getattr(wanted, field):
                raise UserError(
                    f"data.{field}: {path!r} already holds tokens; leave data.{field} empty or "
                    "name the original text in data.path"
                )
        return _load_prepared(folder)
    texts, loaded = wanted.texts(), load_tokenizer(tokenizer, wanted.bos)
    units = [encode_unit(unit, loaded, wanted.reading) for unit in texts.units]
    choice = choose(Listed.of(units), texts.share, texts.count, wanted.duplicates == "drop")
    first, between = joints(loaded)
    train_N, train_start_D = _stream(units, choice.train_D, between)
    heldout_N, heldout_start_D = _stream(units, choice.heldout_D, between)
    return Corpus(
        train_N=train_N,
        heldout_N=heldout_N,
        vocab_size=loaded.vocab_size,
        heldout_size_M=_sizes(units, choice.heldout_D, loaded, between),
        fingerprint=fingerprint(loaded.vocab_size, train_N, heldout_N),
        name=texts.name,
        separator=loaded.separator,
        opening=first.tokens,
        train_start_D=train_start_D,
        heldout_start_D=heldout_start_D,
        facts=facts_of(texts, loaded, choice, units),
        origin=Origin(_kept(texts.split, choice), loaded),
    )


def facts_of(
    texts: Texts, tokenizer: Tokenizer, choice: Choice, units: Sequence[Encoded]
) -> Facts:
    """The facts about a text that was read in units."""
    census, troubles = Census(), Troubles()
    for unit in units:
        census.join(unit.census)
        troubles.join(unit.troubles)
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


def _stream(
    units: Sequence[Encoded], kept_D: np.ndarray, between: Joint
) -> tuple[np.ndarray, np.ndarray]:
    """The stream of one side, and the positions of its documents."""
    parts = [
        joined(unit.token_N, unit.length_D, kept, between.tokens)
        for unit, kept in _by_unit(units, kept_D)
    ]
    length_D = np.concatenate([unit.length_D for unit in units])
    return np.concatenate(parts)[1:], starts(length_D[kept_D], len(between.tokens))


def _sizes(
    units: Sequence[Encoded], kept_D: np.ndarray, tokenizer: Tokenizer, between: Joint
) -> np.ndarray:
    """Bytes of each token of the held-out stream."""
    table_V = tokenizer.token_bytes().astype(SIZE) if tokenizer.is_byte_level else None
    parts = []
    for unit, kept in _by_unit(units, kept_D):
        if not kept.any():
            continue
        size_N = unit.size_N if table_V is None else table_V[unit.token_N]
        assert size_N is not None, "units that may be held out have sizes"
        parts.append(joined(size_N, unit.length_D, kept, between.sizes))
    return np.concatenate(parts)[1:]


def _by_unit(units: Sequence[Encoded], kept_D: np.ndarray) -> Iterator[tuple[Encoded, np.ndarray]]:
    """Each unit with its part of ``kept_D``."""
    ends = np.cumsum([len(unit.length_D) for unit in units])
    return zip(units, np.split(kept_D, ends[:-1]), strict=True)


def _kept(split: Split | None, choice: Choice) -> Split | None:
    """The documents of plain text that were kept; None for records."""
    if split is None:
        return None
    train = tuple(itertools.compress(split.train, choice.train_D[: len(split.train)]))
    heldout = tuple(itertools.compress(split.heldout, choice.heldout_D[len(split.train) :]))
    return dataclasses.replace(split, train=train, heldout=heldout)


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
        opening=tuple(index.opening),
        facts=Facts(**index.facts),
        known_overlap=Overlap(**index.overlap) if index.overlap else None,
    )
