"""A tokenised corpus on disk: `train.bin` and `heldout.bin` (little-endian ids), `heldout.bytes`
(bytes of text per held-out token, little-endian uint32), `train.starts` and `heldout.starts`
(positions of the documents, little-endian int64) and `index.json`.
"""

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moejax.data.joined import Tokens
from moejax.data.tokenizers.interface import SIZE, token_dtype
from moejax.errors import UserError

FORMAT = "moejax tokens 3"
SECOND_FORMAT, FIRST_FORMAT = "moejax tokens 2", "moejax tokens 1"
SECOND_LACKS = {"opening": [], "tokenizer_sha256": "", "licence": ""}
"""Fields that the second format does not have, nor files of positions."""
FIRST_LACKS = {"train_bytes": 0, "heldout_bytes": 0, "facts": {}, "overlap": {}, **SECOND_LACKS}
"""The first one does not have these, nor a file of bytes per token."""
INDEX, TRAIN, HELDOUT, SIZES = "index.json", "train.bin", "heldout.bin", "heldout.bytes"
TRAIN_STARTS, HELDOUT_STARTS = "train.starts", "heldout.starts"
STARTS = np.dtype("<i8")


@dataclasses.dataclass(frozen=True)
class Index:
    """The content of `index.json`, which describes the two shards beside it."""

    dtype: str  # "uint16" or "uint32", little-endian
    vocab_size: int
    separator: int  # token id between documents
    opening: list  # token ids before each document
    train_tokens: int
    heldout_tokens: int
    train_bytes: int
    heldout_bytes: int
    fingerprint: str
    source: str  # name of the text: a file or folder, or the built-in corpus
    tokenizer: str  # name of the tokenizer file, or "bytes"
    tokenizer_sha256: str  # of its content; empty for bytes, and where it is not known
    licence: str  # a note of whoever prepared the text
    eval_fraction: float
    facts: dict  # fields of `corpus.Facts`
    overlap: dict  # fields of `duplicates.Overlap`
    format: str = FORMAT


class Shards(NamedTuple):
    """An index and the arrays it describes, memory-mapped."""

    index: Index
    train_N: np.ndarray
    heldout_N: np.ndarray
    heldout_size_M: np.ndarray | None
    """None for shards of an older version, which did not write it."""
    train_start_D: np.ndarray | None
    heldout_start_D: np.ndarray | None


def fingerprint(vocab_size: int, train_N: Tokens, heldout_N: Tokens) -> str:
    """SHA-256 (hex) over the vocabulary size and the two token arrays.

    Equal for equal values, whatever the element type of the arrays.
    """
    dtype = token_dtype(vocab_size)
    digests = []
    for tokens in (train_N, heldout_N):
        part = hashlib.sha256()
        for begin in range(0, len(tokens), 1 << 24):  # bounded memory for memory-mapped arrays
            chunk = np.ascontiguousarray(tokens[begin : begin + (1 << 24)], dtype=dtype)
            part.update(chunk.data)
        digests.append(part.digest())
    return fingerprint_of_digests(vocab_size, *digests)


def fingerprint_of_digests(vocab_size: int, train: bytes, heldout: bytes) -> str:
    """The fingerprint of token arrays with these SHA-256 digests."""
    # The digests are of fixed length, so that the boundary between the arrays counts.
    return hashlib.sha256(f"{vocab_size}\n".encode() + train + heldout).hexdigest()


class Written(NamedTuple):
    """The number of elements of an array that was written, and the SHA-256 of its bytes."""

    count: int
    digest: bytes


def write_array(path: str, parts: Iterable[np.ndarray]) -> Written:
    """Write the parts of an array to a new file."""
    count, digest = 0, hashlib.sha256()
    with open(path, "xb") as file:
        for part in parts:
            data = np.ascontiguousarray(part).data
            file.write(data)
            digest.update(data)
            count += len(part)
        file.flush()
        os.fsync(file.fileno())
    return Written(count, digest.digest())


def map_tokens(path: str, dtype: np.dtype) -> np.ndarray:
    """The tokens of a shard, memory-mapped and read-only."""
    return np.memmap(path, dtype=dtype, mode="r")


def write_index(folder: str, index: Index) -> None:
    with open(os.path.join(folder, INDEX), "x", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(index), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def is_prepared(path: str) -> bool:
    """True if `path` is a folder of token shards (by its `index.json`), however damaged."""
    index = os.path.join(path, INDEX)
    if not os.path.isfile(index):
        return False
    if any(os.path.exists(os.path.join(path, name)) for name in (TRAIN, HELDOUT)):
        return True
    try:
        with open(index, "rb") as file:  # without its shards, the index must not pass for text
            return b'"moejax tokens ' in file.read(1 << 16)
    except OSError:
        return False  # reported when the folder is read as text


def read_shards(folder: str) -> Shards:
    """The index and the arrays of a prepared folder.

    All tokens are read once to verify the fingerprint. Raises UserError if anything is missing or
    does not match the index.
    """
    try:
        shards = map_shards(folder, _read_index(os.path.join(folder, INDEX)))
    except OSError as error:
        raise _damaged(folder, f"cannot read {error.filename!r}: {error.strerror}") from error
    index = shards.index
    actual = fingerprint(index.vocab_size, shards.train_N, shards.heldout_N)
    if actual != index.fingerprint:
        raise _damaged(folder, f"fingerprint is {actual[:12]}, not {index.fingerprint[:12]}")
    return shards


def map_shards(folder: str, index: Index) -> Shards:
    """The arrays that an index describes. Raises UserError if their sizes do not match it."""
    dtype = token_dtype(index.vocab_size)
    sizes = {TRAIN: index.train_tokens, HELDOUT: index.heldout_tokens}
    for name, count in sizes.items():
        size = os.stat(os.path.join(folder, name)).st_size
        if size != count * dtype.itemsize or count < 1:
            raise _damaged(folder, f"{name} has {size} bytes, not {count * dtype.itemsize}")
    train_N, heldout_N = (map_tokens(os.path.join(folder, name), dtype) for name in sizes)
    return Shards(
        index,
        train_N,
        heldout_N,
        _read_sizes(folder, index),
        _read_starts(folder, TRAIN_STARTS, index, train_N),
        _read_starts(folder, HELDOUT_STARTS, index, heldout_N),
    )


def _read_sizes(folder: str, index: Index) -> np.ndarray | None:
    """Bytes of each held-out token; shards of the first format have them for byte tokens alone."""
    if index.format == FIRST_FORMAT:
        return np.ones(index.heldout_tokens, SIZE) if index.tokenizer == "bytes" else None
    path = os.path.join(folder, SIZES)
    if os.stat(path).st_size != index.heldout_tokens * SIZE.itemsize:
        raise _damaged(folder, f"{SIZES} does not hold {index.heldout_tokens} tokens")
    size_M = map_tokens(path, SIZE)
    if int(size_M.sum(dtype=np.int64)) != index.heldout_bytes:
        raise _damaged(folder, f"{SIZES} does not add up to {index.heldout_bytes} bytes")
    return size_M


def _read_starts(folder: str, name: str, index: Index, token_N: np.ndarray) -> np.ndarray | None:
    """Positions of the documents of one side; None for shards of an older format."""
    if index.format != FORMAT:
        return None
    path = os.path.join(folder, name)
    if os.stat(path).st_size % STARTS.itemsize or not os.stat(path).st_size:
        raise _damaged(folder, f"{name} is cut off")
    start_D = np.fromfile(path, STARTS)
    rising = start_D[0] == 0 and start_D[-1] < len(token_N) and np.all(np.diff(start_D) > 0)
    if not rising or np.any(token_N[start_D[1:] - 1] != index.separator):
        raise _damaged(folder, f"{name} has other positions than those of documents")
    return start_D


def _read_index(path: str) -> Index:
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.path: {path!r} is not JSON ({error}); prepare it again") from error
    kinds = typing.get_type_hints(Index)
    if isinstance(fields, dict) and fields.get("format") == FIRST_FORMAT:
        fields.pop("train_bytes_per_token", None)
        fields.pop("heldout_bytes_per_token", None)
        fields |= FIRST_LACKS
    if isinstance(fields, dict) and fields.get("format") == SECOND_FORMAT:
        fields |= SECOND_LACKS
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise UserError(f"data.path: {path!r} is not an index of token shards; prepare it again")
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise UserError(f"data.path: {path!r} has no valid field {name!r}; prepare it again")
    index = Index(**fields)
    if index.format not in (FORMAT, SECOND_FORMAT, FIRST_FORMAT) or index.vocab_size < 1:
        raise UserError(
            f"data.path: {path!r} has format {index.format!r}, not {FORMAT!r}; prepare it again"
        )
    return index


def _damaged(folder: str, what: str) -> UserError:
    return UserError(
        f"data.path: {folder!r} was changed after it was prepared ({what}); prepare it again"
    )
