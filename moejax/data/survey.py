"""A look at data before they are trained on: what is there, and what would be refused.

Bad records and files never end it; they are counted and the first ones are named. Memory holds a
chunk of the text, and 33 bytes for each document.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from moejax.data.arrays.load import load_arrays
from moejax.data.arrays.table import Found, find_arrays
from moejax.data.assemble import Listed, first_of_equals
from moejax.data.builtin import builtin_documents, builtin_name
from moejax.data.census import Census
from moejax.data.containers import contents_of
from moejax.data.corpus import Corpus
from moejax.data.documents import Document
from moejax.data.encode import (
    BYTES,
    SKIP,
    Encoded,
    Reading,
    Troubles,
    bad_records,
    encode_unit,
    place_of,
)
from moejax.data.formats.files import data_only, without_descriptions
from moejax.data.formats.table import formats_of
from moejax.data.hub import is_hub
from moejax.data.load import corpus_of_shards
from moejax.data.paths import expand, name_of
from moejax.data.shards import Index, is_prepared, read_shards
from moejax.data.tokenizers.interface import Tokenizer, escaped, token_dtype
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.named import tokenizer_digest
from moejax.data.units import BY_HASH, Unit, kinds_of, units_of, weights_of
from moejax.errors import UserError

NAMED = 5
"""Bad records that are named."""
LINE = 120
"""Characters shown of a document."""
SHOWN = 4 * LINE + 4
"""Tokens that have as many characters, if the last one is cut in two."""


@dataclasses.dataclass
class Survey:
    """The contents of data.

    Attributes:
      path: the path that was looked at; empty for the built-in corpus.
      kind: "text", "prepared shards" or "token arrays".
      name: name of the data.
      tokenizer: name of the tokenizer that counts tokens; empty if it is not known.
      files: files that are read.
      formats: the number of files of each format.
      documents: documents that are not empty; None if their ends are not known.
      bytes: bytes of their text, without separators; None if they are not known.
      tokens: their tokens, without separators.
      empty, bad: empty documents, and records that cannot be read. Neither counts as a document.
      first_bad: the first of the latter, with reasons.
      duplicates: documents that are exact copies of others.
      not_utf8, binary: documents that are not UTF-8, or hold NUL or many control characters.
      first_not_utf8, first_binary: the first of each.
      lengths: the number of documents of n to 2n - 1 tokens, by n, the powers of two.
      shortest, longest: tokens and place of the shortest and the longest document.
      first: the first documents, cut off after a line each.
      refused: files that cannot be read, each with its path and the reason.
      ignored: text files beside files of records, which are not read.
      shards: the index of prepared shards, without its facts.
      split: documents and tokens of each side of shards and token arrays, and the rule.
    """

    path: str
    kind: str
    name: str
    tokenizer: str
    files: int = 0
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    documents: int | None = 0
    bytes: int | None = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: list[str] = dataclasses.field(default_factory=list)
    duplicates: int = 0
    not_utf8: int = 0
    first_not_utf8: str = ""
    binary: int = 0
    first_binary: str = ""
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    shortest: dict[str, Any] = dataclasses.field(default_factory=dict)
    longest: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: list[str] = dataclasses.field(default_factory=list)
    refused: list[dict[str, str]] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    shards: dict[str, Any] = dataclasses.field(default_factory=dict)
    split: dict[str, Any] = dataclasses.field(default_factory=dict)


Progress = Callable[[int, int], None]


def survey(
    path: str,
    tokenizer: str = "",
    text_field: str = "text",
    first: int = 3,
    progress: Progress = lambda done, total: None,
) -> Survey:
    """Look at text, prepared shards or token arrays.

    Args:
      path: as ``data.path``.
      tokenizer: as ``data.tokenizer``; empty for bytes. For shards and arrays it is the one that
        made them, which decodes their first documents.
      text_field: as ``data.text_field``.
      first: number of documents to show.
      progress: called with the bytes that are read, and of all files.

    Raises:
      UserError: nothing is there, shards were changed, or the tokenizer is another one.
    """
    if is_hub(path):
        raise UserError(
            f"PATH={path!r} is not on this machine's disk; name files, or save the data set with "
            "datasets.Dataset.save_to_disk and name its folder"
        )
    if first < 0:
        raise UserError(f"--first={first} must be a number of documents, 0 or more")
    folder = os.path.expanduser(path)
    if path and is_prepared(folder):
        return _of_shards(path, tokenizer, first)
    if path and (arrays := find_arrays(path, "PATH")):
        return _of_arrays(path, arrays, tokenizer, first)
    return _of_text(path, load_tokenizer(tokenizer), text_field, first, progress)


# ---------------------------------------------------------------- text


def _of_text(
    path: str, tokenizer: Tokenizer, text_field: str, first: int, progress: Progress
) -> Survey:
    files = expand(path, "PATH") if path else list(builtin_documents())
    found = Survey(path, "text", name_of(path) if path else builtin_name(), tokenizer.name)
    known = []
    for file in without_descriptions(files):
        if reason := _refusal(file):
            found.refused.append({"path": file.path, "reason": reason})
        else:
            known.append(file)
    formats = formats_of([file.path for file in known], "PATH")
    readable = list(zip(known, formats, strict=True))
    read = list(data_only(readable))
    found.ignored = sorted({f.path for f, _ in readable} - {f.path for f, _ in read})
    found.files, found.formats = len(read), kinds_of(read)
    units = [unit for file in read for unit in units_of([file], BY_HASH)]
    reading = Reading(text_field, SKIP)
    total = sum(file.size for file, _ in read)
    chunks = _chunks(units, tokenizer, reading, found, total, progress)
    scanned = _Scanned(tokenizer, first)
    listed = Listed.of(scanned.add(chunk) for chunk in chunks)
    _describe(found, listed.length_D)
    found.bytes = int(listed.size_D.sum())
    copies = ~first_of_equals(listed.digest_D2, np.zeros(len(listed.size_D), bool))
    found.duplicates = int(copies.sum())
    found.empty, found.bad = scanned.troubles.empty, scanned.troubles.bad
    found.first = scanned.first
    census = scanned.census
    found.not_utf8, found.first_not_utf8 = census.not_utf8, census.first_not_utf8
    found.binary, found.first_binary = census.binary, census.first_binary
    characters = tokenizer.vocab_size != BYTES
    found.first_bad = _bad_records(units, scanned.bad_units, reading, characters)
    for extreme in (found.shortest, found.longest):
        if extreme:
            at = extreme.pop("at")
            end_U = np.cumsum([scanned.documents[number] for number in range(len(units))])
            number = int(np.searchsorted(end_U, at, side="right"))
            inside = at - int(end_U[number]) + scanned.documents[number]
            extreme["bytes"] = int(listed.size_D[at])
            extreme["place"] = place_of(units[number], reading, characters, inside)
    return found


def _refusal(file: Document) -> str:
    """The reason why a file is not read; empty if it is."""
    try:
        kind = contents_of(file.path).refused
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if kind is None:
        return ""
    problem = kind.problem or f"looks like {kind.name}, which is not text"
    return f"{problem}; {kind.remedy}"


def _chunks(
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    reading: Reading,
    found: Survey,
    total: int,
    progress: Progress,
) -> Iterator[Encoded]:
    """The chunks of all units; files that turn out not to be readable are listed as refused."""
    weights = weights_of(units)
    refused: set[str] = set()
    done = 0
    for number, unit in enumerate(units):
        path = unit.files[0].path
        if path not in refused:
            try:
                yield from encode_unit(unit, tokenizer, reading, number)
            except UserError as error:
                refused.add(path)
                found.refused.append({"path": path, "reason": str(error)})
        done += weights[number]
        progress(min(done, total), total)


class _Scanned:
    """Facts collected from chunks, which are forgotten."""

    def __init__(self, tokenizer: Tokenizer, first: int):
        self.census, self.troubles = Census(), Troubles()
        self.first: list[str] = []
        self.bad_units: list[int] = []
        self.documents: collections.Counter[int] = collections.Counter()  # of each unit
        self._tokenizer, self._most = tokenizer, first

    def add(self, chunk: Encoded) -> Encoded:
        """The chunk without its tokens."""
        at, missing = 0, self._most - len(self.first)
        for number, length in enumerate(chunk.length_S[: missing + 1].tolist() if missing else ()):
            if (number or chunk.opens) and len(self.first) < self._most:
                shown = chunk.token_N[at : at + min(length, SHOWN)]
                self.first.append(_line(self._tokenizer, shown))
            at += length
        self.census.join(chunk.census)
        self.troubles.join(chunk.troubles)
        if chunk.troubles.bad and chunk.unit not in self.bad_units[-1:]:
            self.bad_units.append(chunk.unit)
        self.documents[chunk.unit] += len(chunk.length_D)
        return chunk.bare()


def _line(tokenizer: Tokenizer, token_N: np.ndarray) -> str:
    """The beginning of a document as one line."""
    text = escaped(tokenizer.decode(token_N.tolist()))
    return text if len(text) <= LINE else f"{text[: LINE - 1]}\u2026"


def _bad_records(
    units: Sequence[Unit], numbers: Sequence[int], reading: Reading, characters: bool
) -> list[str]:
    """The first bad records, with reasons."""
    lines = (line for number in numbers for line in bad_records(units[number], reading, characters))
    return list(itertools.islice(lines, NAMED))


def _describe(found: Survey, length_D: Int64[np.ndarray, " D"]) -> None:
    """Fill in what the lengths of the documents tell."""
    found.documents, found.tokens = len(length_D), int(length_D.sum())
    if not len(length_D):
        return
    exponent_D = np.frexp(length_D.astype(np.float64))[1] - 1  # -1 for a document without tokens
    for exponent, count in enumerate(np.bincount(exponent_D + 1).tolist(), -1):
        if count:
            found.lengths[str(2**exponent if exponent >= 0 else 0)] = count
    shortest, longest = int(np.argmin(length_D)), int(np.argmax(length_D))
    found.shortest = {"tokens": int(length_D[shortest]), "at": shortest}
    found.longest = {"tokens": int(length_D[longest]), "at": longest}


# ---------------------------------------------------------------- tokens


def _of_shards(path: str, tokenizer: str, first: int) -> Survey:
    shards = read_shards(os.path.expanduser(path))
    index = shards.index
    loaded = _own_tokenizer(tokenizer, index)
    found = Survey(path, "prepared shards", index.source, index.tokenizer)
    facts = index.facts
    found.files = sum(facts.get("formats", {}).values())
    found.formats = dict(facts.get("formats", {}))
    found.empty, found.bad = facts.get("empty_documents", 0), facts.get("bad_records", 0)
    found.first_bad = [bad] if (bad := facts.get("first_bad_record", "")) else []
    found.shards = dataclasses.asdict(dataclasses.replace(index, facts={}))
    del found.shards["facts"]
    _of_corpus(found, corpus_of_shards(shards), loaded, first)
    if index.train_bytes and found.documents is not None:
        # Of each side's bytes, one for each separator is not text.
        separators = found.documents - 2
        found.bytes = index.train_bytes + index.heldout_bytes - separators
    return found


def _own_tokenizer(path: str, index: Index) -> Tokenizer | None:
    """The tokenizer of shards, if it is at hand."""
    if not path:
        return load_tokenizer("") if index.tokenizer == "bytes" else None
    loaded = load_tokenizer(path)
    other = index.tokenizer_sha256 and tokenizer_digest(path) != index.tokenizer_sha256
    if other or loaded.vocab_size != index.vocab_size:
        raise UserError(
            f"--tokenizer={path!r} is not the tokenizer of these shards, which is "
            f"{index.tokenizer!r} with {index.vocab_size} tokens; name that one, or none"
        )
    return loaded


def _of_arrays(path: str, arrays: Found, tokenizer: str, first: int) -> Survey:
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = Survey(path, "token arrays", arrays.name, loaded.name if loaded else "")
    files = []
    for file in arrays.files:
        try:
            file.read(loaded.vocab_size if loaded else 0)
            files.append(file)
        except UserError as error:
            found.refused.append({"path": file.path, "reason": str(error)})
    found.files = len(files)
    if not files:
        found.documents, found.bytes = 0, None
        return found
    corpus = load_arrays(dataclasses.replace(arrays, files=tuple(files)), tokenizer)
    found.formats = dict(corpus.facts.formats)
    _of_corpus(found, corpus, loaded, first)
    return found


def _of_corpus(found: Survey, corpus: Corpus, tokenizer: Tokenizer | None, first: int) -> None:
    """Fill in what two streams of tokens tell."""
    sides = {
        "training": (corpus.train_N, corpus.train_start_D),
        "held-out": (corpus.heldout_N, corpus.heldout_start_D),
    }
    found.split = {
        "rule": corpus.facts.split,
        "train_documents": corpus.facts.train_documents,
        "heldout_documents": corpus.facts.heldout_documents,
        "train_tokens": len(corpus.train_N),
        "heldout_tokens": len(corpus.heldout_N),
        "fingerprint": corpus.fingerprint,
    }
    show = lambda token_N: (
        _line(tokenizer, token_N) if tokenizer else "ids " + " ".join(map(str, token_N[:24]))
    )
    lead = len(corpus.opening)
    lengths, digests, owners = [], bytearray(), []
    for side, (token_N, start_D) in sides.items():
        if start_D is None:
            found.documents = None
            continue
        begin_D = start_D + lead
        end_D = np.append(start_D[1:] - 1, len(token_N))
        lengths.append(end_D - begin_D)
        owners += [(side, len(begin_D))]
        for begin, end in zip(begin_D.tolist(), end_D.tolist(), strict=True):
            own = np.ascontiguousarray(token_N[begin:end], token_dtype(corpus.vocab_size))
            digests += hashlib.blake2b(own.data, digest_size=16).digest()
            if len(found.first) < first:
                found.first.append(show(np.asarray(token_N[begin : min(end, begin + SHOWN)])))
    if found.documents is None:
        found.tokens = len(corpus.train_N) + len(corpus.heldout_N)
        found.first = [show(np.asarray(corpus.train_N[:SHOWN]))] if first else []
    else:
        _describe(found, np.concatenate(lengths))
        digest_D2 = np.frombuffer(bytes(digests), ">u8").reshape(-1, 2).astype(np.uint64)
        kept = first_of_equals(digest_D2, np.zeros(len(digest_D2), bool))
        found.duplicates = int(np.sum(~kept))
        for extreme in (found.shortest, found.longest):
            at = extreme.pop("at")
            (side, count), other = owners
            inside = at < count
            extreme["place"] = (
                f"{side} document {at + 1}" if inside else f"{other[0]} document {at - count + 1}"
            )
    found.bytes = _bytes(corpus, tokenizer)


def _bytes(corpus: Corpus, tokenizer: Tokenizer | None) -> int | None:
    """Bytes of the text of all tokens; None if they are not known."""
    if tokenizer is None or not tokenizer.is_byte_level:
        return None
    size_V = tokenizer.token_bytes().astype(np.int64)
    size_V[list(corpus.opening)] = 0
    if corpus.separator >= 0:
        size_V[corpus.separator] = 0
    step = 1 << 22
    return sum(
        int(size_V[np.asarray(token_N[begin : begin + step])].sum())
        for token_N in (corpus.train_N, corpus.heldout_N)
        for begin in range(0, len(token_N), step)
    )
