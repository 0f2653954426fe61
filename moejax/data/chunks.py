"""Chunks of tokenised documents on disk, between the processes of `data prepare` and its end."""

import dataclasses
import json
import os
from collections.abc import Iterator

import numpy as np
import safetensors
import safetensors.numpy

from moejax.data.census import Census
from moejax.data.encode import SKIP, Encoded, Troubles

_ARRAYS = ("token_N", "length_S", "length_D", "size_D", "digest_D2", "size_N")


def write_unit(folder: str, key: str, chunks: Iterator[Encoded]) -> None:
    """Write the chunks of a unit. A file ``KEY.done``, which comes last, says how many there are
    and how many of its records were bad."""
    count = bad = 0
    for chunk in chunks:
        arrays = {name: getattr(chunk, name) for name in _ARRAYS}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        facts = {
            "side": chunk.side,
            "opens": json.dumps(chunk.opens),
            "census": json.dumps(dataclasses.asdict(chunk.census)),
            "troubles": json.dumps(dataclasses.asdict(chunk.troubles)),
        }
        # Written here, not by the library, whose errors do not say that the disk is full.
        with open(_path(folder, key, count), "wb") as file:
            file.write(safetensors.numpy.save(arrays, facts))
            file.flush()
            os.fsync(file.fileno())
        count, bad = count + 1, bad + chunk.troubles.bad
    part = os.path.join(folder, f"{key}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump({"chunks": count, "bad": bad}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, os.path.join(folder, f"{key}.done"))


def is_done(folder: str, key: str, on_error: str) -> bool:
    """True if a unit was written, and has no bad record unless these are skipped."""
    try:
        with open(os.path.join(folder, f"{key}.done"), encoding="utf-8") as file:
            return on_error == SKIP or not json.load(file)["bad"]
    except FileNotFoundError:
        return False


@dataclasses.dataclass(frozen=True)
class StoredChunks:
    """The chunks of units in their order, read when they are asked for.

    ``tokens``: whether to read their tokens too; without, these are empty.
    """

    folder: str
    keys: tuple[str, ...]
    tokens: bool = True

    def __iter__(self) -> Iterator[Encoded]:
        for number, key in enumerate(self.keys):
            with open(os.path.join(self.folder, f"{key}.done"), encoding="utf-8") as file:
                count = json.load(file)["chunks"]
            for index in range(count):
                yield self._read(_path(self.folder, key, index), number)

    def _read(self, path: str, unit: int) -> Encoded:
        with safetensors.safe_open(path, "numpy") as file:
            facts = file.metadata()
            names = set(file.keys())
            arrays = {
                name: file.get_tensor(name)
                for name in names
                if self.tokens or name not in ("token_N", "size_N")
            }
        none = np.zeros(0, np.uint16)
        return Encoded(
            side=facts["side"],
            token_N=arrays.get("token_N", none),
            length_S=arrays["length_S"],
            opens=json.loads(facts["opens"]),
            length_D=arrays["length_D"],
            size_D=arrays["size_D"],
            digest_D2=arrays["digest_D2"],
            size_N=arrays.get("size_N"),
            census=Census(**json.loads(facts["census"])),
            troubles=Troubles(**json.loads(facts["troubles"])),
            unit=unit,
        )


def _path(folder: str, key: str, index: int) -> str:
    return os.path.join(folder, f"{key}-{index:04d}.safetensors")
