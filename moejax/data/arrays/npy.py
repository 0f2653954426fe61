"""NumPy's .npy files: one array of integers, of any width and byte order."""

import os

import numpy as np

from moejax.data.arrays.array import TokenArray, read_head, refused

MAGIC = b"\x93NUMPY"


def matches(path: str) -> bool:
    return path.lower().endswith(".npy")


def read(path: str, field: str, vocab_size: int) -> TokenArray:
    if read_head(path, len(MAGIC)) != MAGIC:
        raise refused(
            field,
            path,
            "does not begin as NumPy's .npy files do; ids without a header are read from files "
            "named .bin, so rename it if it holds such ids",
        )
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:  # NumPy evaluates the header as a literal
        reason = str(error).splitlines()[0]
        raise refused(
            field, path, f"is damaged or holds no numbers ({reason}); save it again"
        ) from error
    if array.dtype.kind not in "iu":
        raise refused(
            field, path, f"holds {array.dtype} and no integers; save token ids, as uint16 or uint32"
        )
    if array.ndim != 1:
        raise refused(
            field,
            path,
            f"has shape {array.shape}; save one stream of ids, numpy.save(FILE, ids.reshape(-1))",
        )
    if not array.size:
        raise refused(field, path, "is empty; remove it or save it again")
    rest = os.path.getsize(path) - array.offset - array.nbytes
    if rest:
        raise refused(
            field, path, f"has {rest} bytes behind its array; save every array in a file of its own"
        )
    order = ", big-endian" if array.dtype.newbyteorder("<") != array.dtype else ""
    return TokenArray(path, field, f"NumPy .npy, {array.dtype.name}{order}", array)
