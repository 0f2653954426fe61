"""Token ids without a header, little-endian: nanoGPT's train.bin and val.bin.

The file does not tell the width of its ids. uint16 is what nanoGPT writes. A file is read as uint32
or int64 if its first 64 KiB look so: every second (second to fourth) uint16 is 0, as in wide ids
below 65536; or all of them are below 32 and the others are not, as in wide ids up to two million.
Where a vocabulary is known that has no room in uint16, ids of 32 bits that are all below it also
make uint32.
"""

import os

import numpy as np

from moejax.data.arrays.array import TokenArray, map_ids, read_head, refused
from moejax.data.containers import MAGIC

HEAD = 1 << 16
LONG = 4
"""Bytes of a mark of another format that do not stand at the start of ids by chance."""
FEW = 64
"""Ids below which a file does not show how wide they are."""


def matches(path: str) -> bool:
    return path.lower().endswith(".bin")


def read(path: str, field: str, vocab_size: int) -> TokenArray:
    head, size = read_head(path, HEAD), os.path.getsize(path)
    if not size:
        raise refused(field, path, "is empty; remove it or write it again")
    for at, mark, kind in MAGIC:
        if len(mark) >= LONG and head[at : at + len(mark)] == mark:
            raise refused(field, path, f"looks like {kind.name}; a .bin file is read as token ids")
    if _is_text(head):
        raise refused(
            field, path, "looks like text; a .bin file is read as token ids, so rename it"
        )
    dtype = width(head, size, vocab_size)
    if size % dtype.itemsize:
        raise refused(
            field,
            path,
            f"has {size} bytes, which is no whole number of {dtype.name}; copy it again, or name "
            "a file of token ids (uint16 or uint32, little-endian, without a header)",
        )
    return TokenArray(path, field, f"nanoGPT .bin, {dtype.name}", map_ids(path, dtype))


def width(head: bytes, size: int, vocab_size: int) -> np.dtype:
    """The element type of a file of ``size`` bytes that begins with ``head``."""
    whole = len(head) // 8 * 8
    if size % 4 == 0:
        if whole >= 2 * FEW * 2 and _is_wide(np.frombuffer(head[:whole], "<u2")):
            narrow = np.frombuffer(head[:whole], "<u4")
            wide = size % 8 == 0 and not narrow[1::2].any() and bool(narrow[::2].any())
            return np.dtype("<i8" if wide else "<u4")
        ids = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
        if vocab_size > 1 << 16 and len(ids) and ids.max() < vocab_size:
            return np.dtype("<u4")
    return np.dtype("<u2")


def _is_wide(half_N: np.ndarray) -> bool:
    low, high = int(half_N[::2].max()), int(half_N[1::2].max())
    return (high == 0 and low > 0) or (high < 32 and low >= 1024)


def _is_text(head: bytes) -> bool:
    """True if all is printable UTF-8. In ids, bytes that are control characters abound."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not the character that the head cuts
            return False
        text = head[: error.start].decode("utf-8")
    return len(text) >= 4 and all(c.isprintable() or c in "\n\r\t\f" for c in text)
