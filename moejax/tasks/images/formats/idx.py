"""IDX, the files of MNIST: an array with a short header, pictures and labels apart.

A header has two bytes 0, the type of the elements (8: unsigned bytes), the number of dimensions,
and each dimension as a big-endian 32-bit number (http://yann.lecun.com/exdb/mnist).
"""

import gzip
import math
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, cast

import numpy as np

from moejax.errors import UserError
from moejax.tasks.images.formats.files import side_of
from moejax.tasks.images.formats.format import Labels, Picture, damaged, most_bytes, reading

NAME = re.compile(r"(train|t10k|test|val|validation)-images([-.])idx3-ubyte(\.gz)?", re.I)
BYTES = 8
"""The element type of unsigned bytes."""
AT_ONCE = 1 << 20
"""Bytes read at once."""


class Idx:
    """MNIST, Fashion-MNIST and others in their form: ``train-images-idx3-ubyte[.gz]`` with
    ``train-labels-idx1-ubyte[.gz]``; ``t10k-`` is the test side. Classes have no names but their
    numbers."""

    name = "IDX"

    def owns(self, path: str) -> bool:
        return NAME.fullmatch(os.path.basename(path)) is not None

    def side(self, name: str) -> str:
        match = NAME.fullmatch(name.rpartition("/")[2])
        side = match[1].lower() if match else side_of(name)
        return "test" if side == "t10k" else side

    def companions(self, name: str) -> tuple[str, ...]:
        return (name,)

    def labels(self, path: str) -> Labels:
        beside = _labels_beside(path)
        with reading(path, "an IDX file"), _open(path) as file:
            count = _header(file, path, 3)[0]
        with reading(beside, "an IDX file"), _open(beside) as file:
            (labels,) = _header(file, beside, 1)
            data = file.read(labels + 1)
        if labels != count:
            raise UserError(
                f"data.path: {beside!r} has {labels} labels, and {path!r} {count} pictures; keep "
                "files that belong together"
            )
        _check_length(beside, len(data), labels)
        return Labels(list(data))

    def pictures(self, path: str) -> Iterator[Picture]:
        with reading(path, "an IDX file"), _open(path) as file:
            count, height, width = _header(file, path, 3)
            size = height * width
            at_once = max(AT_ONCE // size, 1)
            for begin in range(0, count, at_once):
                rows = min(at_once, count - begin)
                data = file.read(rows * size)
                _check_length(path, begin * size + len(data), (begin + rows) * size)
                pixels = np.frombuffer(data, np.uint8).reshape(rows, height, width)
                for row, picture in enumerate(pixels, begin + 1):
                    yield Picture(f"{path}:{row}", picture)
            _check_length(path, count * size + len(file.read(1)), count * size)


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.endswith(".gz") else open(path, "rb"))


def _labels_beside(path: str) -> str:
    """The file of labels that belongs to one of pictures, packed or not."""
    folder, name = os.path.split(path)
    match = NAME.fullmatch(name)
    assert match, path
    side, dot, _ = match.groups()
    plain = os.path.join(folder, f"{side}-labels{dot}idx1-ubyte")
    for candidate in (plain, plain + ".gz"):
        if os.path.exists(candidate):
            return candidate
    raise UserError(f"data.path: {path!r} has no labels beside it; add {plain!r} (or .gz)")


def _header(file: BinaryIO, path: str, dimensions: int) -> tuple[int, ...]:
    """The dimensions of the array in a file, which is left at the first element."""
    head = file.read(4 + 4 * dimensions)
    expected = bytes((0, 0, BYTES, dimensions))
    if head[:4] != expected or len(head) < 4 + 4 * dimensions:
        raise damaged(
            path,
            f"an IDX file of bytes in {dimensions} dimensions",
            f"it begins with {head[:4].hex(' ') or 'nothing'}, not {expected.hex(' ')} and its "
            "dimensions",
        )
    shape = tuple(int(size) for size in np.frombuffer(head, ">u4", dimensions, 4))
    if math.prod(shape) == 0:
        raise UserError(f"data.path: {path!r} is an empty array, {shape}; name another")
    packed = path.endswith(".gz")
    room = most_bytes(path, packed) - len(head)
    # Before memory is taken for the number in a damaged header.
    _check_length(path, min(room, math.prod(shape)) if packed else room, math.prod(shape))
    return shape


def _check_length(path: str, found: int, wanted: int) -> None:
    """Raise UserError unless the elements are as many as the header says."""
    if found != wanted:
        reason = "it is truncated" if found < wanted else "it is longer than its header says"
        raise damaged(path, "a whole IDX file", reason)
