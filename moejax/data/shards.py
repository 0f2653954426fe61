"""A tokenised corpus on disk: `train.bin`, `heldout.bin` (little-endian ids) and `index.json`."""

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt

from moejax.data.tokenizer import token_dtype
from moejax.errors import UserError

FORMAT = "moejax tokens 1"
INDEX, TRAIN, HELDOUT = "index.json", "train.bin", "heldout.bin"


@dataclasses.dataclass(frozen=True)
class Index:
    """What `index.json` says about the two shards beside it."""

    dtype: str  # "uint16" or "uint32", little-endian
    vocab_size: int
    separator: int  # token id between documents
    train_tokens: int
    heldout_tokens: int
    train_bytes_per_token: float
    heldout_bytes_per_token: float
    fingerprint: str
    source: str  # name of the text: a file or folder, or the built-in corpus
    tokenizer: str  # name of the tokenizer file, or "bytes"
    eval_fraction: float
    format: str = FORMAT


def fingerprint(
    vocab_size: int, train_N: UInt[np.ndarray, " N"], heldout_N: UInt[np.ndarray, " M"]
) -> str:
    """SHA-256 (hex) over the vocabulary size and the two token arrays.

    Equal for equal values, whatever the element type the arrays are held in.
    """
    dtype = token_dtype(vocab_size)
    total = hashlib.sha256(f"{vocab_size}\n".encode())
    for tokens in (train_N, heldout_N):
        part = hashlib.sha256()
        for begin in range(0, len(tokens), 1 << 24):  # bounded memory for memory-mapped arrays
            chunk = np.ascontiguousarray(tokens[begin : begin + (1 << 24)], dtype=dtype)
            part.update(chunk.data)
        total.update(part.digest())  # of fixed length, so the boundary counts
    return total.hexdigest()


def write_tokens(path: str, parts: Iterable[tuple[np.ndarray, int]]) -> tuple[int, int]:
    """Appends the parts' tokens to a new file; returns the numbers of tokens and of text bytes."""
    num_tokens = num_bytes = 0
    with open(path, "xb") as file:
        for tokens, size in parts:
            file.write(tokens.data)
            num_tokens += len(tokens)
            num_bytes += size
        file.flush()
        os.fsync(file.fileno())
    return num_tokens, num_bytes


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
    """Whether `path` is a folder of token shards (by its `index.json`), however damaged."""
    index = os.path.join(path, INDEX)
    if not os.path.isfile(index):
        return False
    if any(os.path.exists(os.path.join(path, name)) for name in (TRAIN, HELDOUT)):
        return True
    try:
        with open(index, "rb") as file:  # shards gone: do not train on the index as if it were text
            return b'"moejax tokens ' in file.read(1 << 16)
    except OSError:
        return False  # reported when the folder is read as text


def read_shards(folder: str) -> tuple[Index, np.ndarray, np.ndarray]:
    """Index, training and held-out tokens (memory-mapped) of a prepared folder.

    All tokens are read once to verify the fingerprint. Raises UserError if anything is missing or
    differs from what the index says.
    """
    try:
        index = _read_index(os.path.join(folder, INDEX))
        dtype = token_dtype(index.vocab_size)
        sizes = {TRAIN: index.train_tokens, HELDOUT: index.heldout_tokens}
        for name, count in sizes.items():
            size = os.stat(os.path.join(folder, name)).st_size
            if size != count * dtype.itemsize or count < 1:
                raise _damaged(folder, f"{name} has {size} bytes, not {count * dtype.itemsize}")
        train_N, heldout_N = (map_tokens(os.path.join(folder, name), dtype) for name in sizes)
    except OSError as error:
        raise _damaged(folder, f"cannot read {error.filename!r}: {error.strerror}") from error
    found = fingerprint(index.vocab_size, train_N, heldout_N)
    if found != index.fingerprint:
        raise _damaged(folder, f"fingerprint is {found[:12]}, not {index.fingerprint[:12]}")
    return index, train_N, heldout_N


def _read_index(path: str) -> Index:
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except ValueError as error:
        raise UserError(f"data.path: {path!r} is not JSON ({error}); prepare it again") from error
    kinds = typing.get_type_hints(Index)
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise UserError(f"data.path: {path!r} is not an index of token shards; prepare it again")
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise UserError(f"data.path: {path!r} has no valid field {name!r}; prepare it again")
    index = Index(**fields)
    if index.format != FORMAT or index.vocab_size < 1:
        raise UserError(
            f"data.path: {path!r} has format {index.format!r}, not {FORMAT!r}; prepare it again"
        )
    return index


def _damaged(folder: str, what: str) -> UserError:
    return UserError(
        f"data.path: {folder!r} was changed after it was prepared ({what}); prepare it again"
    )
