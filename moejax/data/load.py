"""Text, prepared shards and token arrays of others as a corpus."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt

from moejax.data.arrays.load import load_arrays
from moejax.data.arrays.table import find_arrays
from moejax.data.assemble import Choice, Listed, choose, size_parts, starts, token_parts
from moejax.data.census import Census
from moejax.data.corpus import Corpus, Facts, Origin
from moejax.data.documents import Piece
from moejax.data.duplicates import Overlap
from moejax.data.encode import (
    BYTES,
    Encoded,
    Reading,
    Troubles,
    bad_records,
    encode_unit,
    pieces_of,
)
from moejax.data.hub import is_hub
from moejax.data.shards import Shards, fingerprint, is_prepared, read_shards
from moejax.data.split import Split
from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.interface import SIZE, Tokenizer, joints
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.units import Texts, open_texts
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A text and the corpus to make of it; each is a field of the section ``data`` of a config."""

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
        """The documents, before they are read.

        Raises:
          UserError: there are none, or their tokens instead.
        """
        for field, path in (("data.path", self.path), ("data.eval_path", self.eval_path)):
            if path:
                _check_is_text(field, path)
        return open_texts(self.path, self.eval_fraction, self.eval_path, self.split)

    @property
    def drops_copies(self) -> bool:
        """True if exact copies are left out. The built-in text is freed of near copies already."""
        return self.duplicates == "drop" and bool(self.path)

    @property
    def reading(self) -> Reading:
        return Reading(self.text_field, self.on_error)


def _check_is_text(field: str, path: str) -> None:
    if is_hub(path):
        raise UserError(
            f"{field}={path!r} is read only while training; to read it "
            "before, save it with datasets.Dataset.save_to_disk and name its folder"
        )
    if is_prepared(os.path.expanduser(path)):
        raise UserError(f"{field}: {path!r} is already prepared; name the original text")
    arrays = find_arrays(path, field)
    if arrays and not arrays.others:
        raise UserError(
            f"{field}: {path!r} holds token ids, which a run reads as they are; name text here"
        )


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
        return load_arrays(arrays, tokenizer, eval_fraction, eval_path, vocab_size)
    texts, loaded = wanted.texts(), load_tokenizer(tokenizer, wanted.bos)
    chunks = [
        chunk
        for number, unit in enumerate(texts.units)
        for chunk in encode_unit(unit, loaded, wanted.reading, number)
    ]
    listed = Listed.of(chunks)
    choice = choose(listed, texts.share, texts.count, wanted.drops_copies)
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
        facts=facts_of(texts, loaded, choice, chunks, wanted.reading),
        origin=Origin(kept_split(texts.split, choice), loaded),
    )


class _NoTokens(ByteTokenizer):
    """A tokenizer for which only digests and sizes of documents are made."""

    vocab_size = BYTES + 1  # its documents must be UTF-8, as for any other than bytes

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        return [np.zeros(0, np.uint8)] * len(pieces)


def training_pieces(wanted: Wanted) -> Iterator[Piece]:
    """The text to train on, in pieces. It is read twice: first to see which documents those are."""
    texts, reading = wanted.texts(), wanted.reading
    listed = Listed.of(
        chunk.bare()
        for number, unit in enumerate(texts.units)
        for chunk in encode_unit(unit, _NoTokens(), reading, number)
    )
    choice = choose(listed, texts.share, texts.count, wanted.drops_copies)
    number, troubles = -1, Troubles()
    for unit in texts.units:
        for piece in pieces_of(unit, reading, lambda: troubles, characters=True):
            number += piece.is_first
            if choice.train_D[number]:
                yield piece


def size_table(tokenizer: Tokenizer) -> UInt[np.ndarray, " V"] | None:
    """Bytes of each token id; None unless the tokenizer is byte-level."""
    return tokenizer.token_bytes().astype(SIZE) if tokenizer.is_byte_level else None


def facts_of(
    texts: Texts,
    tokenizer: Tokenizer,
    choice: Choice,
    chunks: Iterable[Encoded],
    reading: Reading,
) -> Facts:
    """The facts about a text that was read in chunks."""
    census, troubles, bad = Census(), Troubles(), ""
    for chunk in chunks:
        if chunk.troubles.bad and not bad:
            characters = tokenizer.vocab_size != BYTES
            bad = next(bad_records(texts.units[chunk.unit], reading, characters))
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
        first_bad_record=bad,
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
