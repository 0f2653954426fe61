"""Megatron-LM's indexed datasets: NAME.bin with the ids and NAME.idx with lengths and documents.

The index, little-endian: the magic bytes, a uint64 version (1), a uint8 code of the element type,
the uint64 numbers S of sequences and D of document bounds, then int32 lengths [S], int64 byte
offsets [S] and int64 document bounds [D] (numbers of sequences, from 0 to S). Sequences follow each
other in the .bin file without gaps. Megatron-DeepSpeed, GPT-NeoX and datatrove write the same.
"""

import os
import struct

import numpy as np
from jaxtyping import Int64

from moejax.data.arrays.array import TokenArray, map_ids, read_head, refused
from moejax.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
HEADER_BYTES = len(MAGIC) + HEADER.size
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""Element types of ids; 9 and 10 are Megatron-DeepSpeed's."""
FLOATS = (6, 7)
CHUNK = 1 << 22
AGAIN = "write it again with Megatron's tools/preprocess_data.py"


def matches(path: str) -> bool:
    stem, suffix = os.path.splitext(path)
    return suffix.lower() == ".idx" or (suffix.lower() == ".bin" and os.path.isfile(stem + ".idx"))


def read(path: str, field: str, vocab_size: int) -> TokenArray:
    stem = os.path.splitext(path)[0]
    ids_path, index_path = stem + ".bin", stem + ".idx"
    if not os.path.isfile(ids_path):
        raise refused(
            field,
            index_path,
            f"is an index of {os.path.basename(ids_path)!r}, which is missing; copy it too",
        )
    dtype, length_S, offset_S, bound_D = _read_index(index_path, field)
    count = _check_offsets(index_path, field, length_S, offset_S, dtype.itemsize)
    size = os.path.getsize(ids_path)
    if size != count * dtype.itemsize:
        raise refused(
            field,
            ids_path,
            f"has {size} bytes, but its index counts {count} tokens of {dtype.itemsize} bytes; "
            "copy both files again",
        )
    if not count:
        raise refused(field, ids_path, "holds no tokens; remove it")
    start_D = offset_S[bound_D[bound_D < len(offset_S)]] // dtype.itemsize
    start_D = np.unique(start_D)  # documents without tokens share the start of the next
    return TokenArray(
        ids_path,
        field,
        f"Megatron .bin/.idx, {dtype.name}",
        map_ids(ids_path, dtype),
        start_D[start_D < count],
    )


def _read_index(
    path: str, field: str
) -> tuple[np.dtype, np.ndarray, Int64[np.ndarray, " S"], Int64[np.ndarray, " D"]]:
    """Element type, lengths and byte offsets of the sequences, and bounds of the documents."""
    head = read_head(path, HEADER_BYTES)
    if not head.startswith(MAGIC):
        raise refused(field, path, f"does not begin with {MAGIC!r}; {AGAIN}")
    if len(head) < HEADER_BYTES:
        raise _wrong_size(path, field, HEADER_BYTES)
    version, code, sequences, bounds = HEADER.unpack(head[len(MAGIC) :])
    if version != 1:
        raise refused(field, path, f"has version {version} of Megatron's index, not 1; {AGAIN}")
    if code not in CODES:
        what = "floating-point numbers" if code in FLOATS else f"elements of unknown type {code}"
        raise refused(field, path, f"is the index of {what} and not of token ids; {AGAIN}")
    size = HEADER_BYTES + 12 * sequences + 8 * bounds
    actual = os.path.getsize(path)
    if actual == size + sequences and sequences:
        raise refused(
            field, path, "has the modes of a multimodal dataset; only datasets of text are read"
        )
    if actual != size:
        raise _wrong_size(path, field, size)
    if not sequences:
        raise refused(field, path, "counts no sequences; remove it, and its .bin file")
    data = np.memmap(path, mode="r")
    length_S = data[HEADER_BYTES:][: 4 * sequences].view("<i4")
    offset_S = data[HEADER_BYTES + 4 * sequences :][: 8 * sequences].view("<i8")
    bound_D = data[HEADER_BYTES + 12 * sequences :].view("<i8")
    if not bounds or bound_D[0] != 0 or bound_D.max() > sequences or np.any(np.diff(bound_D) < 0):
        raise refused(field, path, f"has bounds of documents that are not ascending; {AGAIN}")
    return np.dtype(CODES[code]), length_S, offset_S, bound_D


def _wrong_size(path: str, field: str, size: int) -> UserError:
    return refused(
        field,
        path,
        f"has {os.path.getsize(path)} bytes, not the {size} that its header counts; copy it again",
    )


def _check_offsets(
    path: str, field: str, length_S: np.ndarray, offset_S: np.ndarray, itemsize: int
) -> int:
    """The number of tokens. Raises UserError unless sequences follow each other without gaps."""
    count = 0
    for begin in range(0, len(length_S), CHUNK):
        length_C = length_S[begin : begin + CHUNK].astype(np.int64)
        end_C = count + np.cumsum(length_C)
        wrong_C = (length_C < 0) | (
            offset_S[begin : begin + CHUNK] != (end_C - length_C) * itemsize
        )
        if wrong_C.any():
            at = begin + int(np.argmax(wrong_C))
            raise refused(
                field,
                path,
                f"puts sequence {at} (length {length_S[at]}) at byte {offset_S[at]}, where the "
                f"sequences before it do not end; {AGAIN}",
            )
        count = int(end_C[-1])
    return count
