"""The binary version of CIFAR-10 and CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html).

A record is the label, one byte (CIFAR-10) or two, coarse and fine (CIFAR-100), and 32 x 32 pixels:
all red values in reading order, all green ones, all blue ones.
"""

import dataclasses
import os
import re
from collections.abc import Iterator

import numpy as np

from moejax.errors import UserError
from moejax.tasks.images.formats.format import Labels, Picture, damaged, reading

SIDE = 32
PIXELS = 3 * SIDE * SIDE
RECORDS = 1024
"""Records read at once."""


@dataclasses.dataclass(frozen=True)
class Cifar:
    """Files of one of the two sets, with the names of the classes in a text file beside them.

    Attributes:
      train, test: patterns of the names of the files.
      names: the file with the names of the classes, one a line.
      header: bytes before the pixels, the last of which is the label.
      complete: names of all files of the training side.
    """

    name: str
    train: str
    test: str
    names: str
    header: int
    complete: tuple[str, ...]

    def owns(self, path: str) -> bool:
        return self.side(os.path.basename(path)) != ""

    def side(self, name: str) -> str:
        base = name.rpartition("/")[2]
        if re.fullmatch(self.train, base):
            return "train"
        return "test" if re.fullmatch(self.test, base) else ""

    def companions(self, name: str) -> tuple[str, ...]:
        return self.complete if self.side(name) == "train" else (name,)

    def labels(self, path: str) -> Labels:
        return Labels(
            [record[self.header - 1] for record in self._records(path)], self._class_names(path)
        )

    def pictures(self, path: str) -> Iterator[Picture]:
        for row, record in enumerate(self._records(path), 1):
            pixels = np.frombuffer(record, np.uint8, PIXELS, self.header)
            planes = pixels.reshape(3, SIDE, SIDE)
            yield Picture(f"{path}:{row}", np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def _records(self, path: str) -> Iterator[bytes]:
        size = self.header + PIXELS
        with reading(path, f"a file of {self.name}"), open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            if total == 0 or total % size:
                raise damaged(
                    path,
                    f"a whole file of {self.name}",
                    f"{total} bytes are not a number of records of {size}",
                )
            while data := file.read(RECORDS * size):
                for begin in range(0, len(data), size):
                    yield data[begin : begin + size]

    def _class_names(self, path: str) -> tuple[str, ...]:
        beside = os.path.join(os.path.dirname(path), self.names)
        if not os.path.exists(beside):
            raise UserError(
                f"data.path: {path!r} looks like {self.name}, but {self.names!r}, the names of its "
                "classes, is not beside it; add it"
            )
        with reading(beside, "a file of names", UnicodeDecodeError), open(beside, "rb") as file:
            lines = file.read().decode("utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())


BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10 = Cifar(
    "CIFAR-10", r"data_batch_[1-5]\.bin", r"test_batch\.bin", "batches.meta.txt", 1, BATCHES
)
CIFAR100 = Cifar(
    "CIFAR-100", r"train\.bin", r"test\.bin", "fine_label_names.txt", 2, ("train.bin",)
)
