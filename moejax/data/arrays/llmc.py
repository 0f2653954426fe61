"""Token files of llm.c (``dev/data/data_common.py``), also of modded-nanogpt.

256 little-endian int32, of which the first three are a magic number, the version and the number of
tokens; then the tokens, uint16 for GPT-2's vocabulary and uint32 for Llama 3's.
"""

import os

import numpy as np

from moejax.data.arrays.array import TokenArray, map_ids, read_head, refused

HEADER = np.dtype("<i4")
HEADER_BYTES = 256 * HEADER.itemsize
KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Version and element type by magic number."""
CHOICES = 20240522
"""The magic number of multiple-choice questions."""


def matches(path: str) -> bool:
    head = np.frombuffer(read_head(path, HEADER.itemsize).ljust(4, b"\0"), HEADER)
    return path.lower().endswith(".bin") and int(head[0]) in (*KINDS, CHOICES)


def read(path: str, field: str, vocab_size: int) -> TokenArray:
    head = read_head(path, HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise refused(field, path, "ends in its llm.c header; copy it again")
    magic, version, count = np.frombuffer(head, HEADER)[:3].tolist()
    if magic == CHOICES:
        raise refused(
            field, path, "holds multiple-choice questions of llm.c; name a file of tokens"
        )
    known, dtype = KINDS[magic]
    if version != known:
        raise refused(
            field, path, f"has version {version} of llm.c's format, not {known}; write it again"
        )
    ids, size = np.dtype(dtype), os.path.getsize(path) - HEADER_BYTES
    if count < 1:
        raise refused(field, path, f"has a header that counts {count} tokens; write it again")
    if size != count * ids.itemsize:
        raise refused(
            field,
            path,
            f"has {size} bytes of tokens, but its llm.c header counts {count} tokens of "
            f"{ids.itemsize} bytes; copy it again",
        )
    return TokenArray(path, field, f"llm.c .bin, {ids.name}", map_ids(path, ids, HEADER_BYTES))
