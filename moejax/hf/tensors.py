"""Folders of safetensors files, as Hugging Face lays them out: read in slices, written in shards.

    model.safetensors                     everything in one file, or
    model.safetensors.index.json          {"weight_map": {"model.norm.weight": FILE, ...}}
    model-00001-of-00003.safetensors

Files are mapped into memory, and a tensor or a slice of it is copied when it is read. No pickle is
ever read: a `.bin` or `.pt` file is refused.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from moejax.errors import UserError
from moejax.record.files import replaced, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_BYTES = 4 * 10**9
"""Shards are at most this large, unless one tensor is."""


class TensorFolder:
    """The tensors of a folder, by name.

    Raises:
      UserError: no safetensors file, or one that is missing, truncated or not named by the index.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._stack = contextlib.ExitStack()
        self._files = {name: self._opened(name) for name in self._file_names()}
        self._file_of = {
            tensor: name for name, file in self._files.items() for tensor in file.keys()
        }
        self._check_index()

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in order."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type of a tensor in the words of the format, such as "BF16"."""
        return self._slice(name).get_dtype()

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._file_of[name]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at these slices of its first axes."""
        part = self._slice(name)
        return part[index] if index else part[:] if part.get_shape() else self._whole(name)

    def _whole(self, name: str) -> np.ndarray:
        return self._files[self._file_of[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def _file_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            return sorted(set(self._weight_map().values()))
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        loose = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(loose) == 1:
            return loose
        pickled = [path.name for kind in PICKLED for path in sorted(self.folder.glob(kind))]
        if pickled:
            raise UserError(
                f"{self.folder / pickled[0]} is a pickle, which can run any program when it is "
                "read; save the model as safetensors (save_pretrained of transformers does)"
            )
        raise UserError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}; name the folder of a Hugging Face "
            "model"
        )

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"{path} is not an index of tensors ({type(error).__name__}: {error}); download it "
                "again"
            ) from error
        outside = [name for name in weights.values() if Path(name).name != name]
        if outside:
            raise UserError(f"{path} names {outside[0]!r}, which is not a file beside it")
        return weights

    def _opened(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, but {INDEX} names it; download it again")
        try:
            return self._stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except safetensors.SafetensorError as error:
            self._stack.close()
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} is damaged or cut off ({reason}); download it again"
            ) from error

    def _check_index(self) -> None:
        if not (self.folder / INDEX).is_file():
            return
        weights = self._weight_map()
        for tensor, name in weights.items():
            if self._file_of.get(tensor) != name:
                raise UserError(
                    f"{self.folder / INDEX} says that {name} has the tensor {tensor!r}, but it has "
                    "not; download both again"
                )


def write_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    sizes: dict[str, int],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors in their order, a shard at a time, and the index if there are several.

    Args:
      tensors: names and values; read once, so that no more than a shard is in memory.
      sizes: the bytes of each, known before, which decide the shards.

    Raises:
      UserError: a file cannot be written.
    """
    folder = Path(folder)
    shards = list(_shards(sizes, shard_bytes))
    several = len(shards) > 1
    names = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if several else SINGLE
        for i in range(len(shards))
    ]
    source = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        kept = dict(next(source) for _ in shard)
        assert list(kept) == shard, "tensors come in the order of their sizes"
        with replaced(folder / file) as temporary:
            safetensors.numpy.save_file(kept, temporary, metadata={"format": "pt"})
    if several:
        weight_map = {t: file for file, shard in zip(names, shards, strict=True) for t in shard}
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, about)


def _shards(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names, cut where a shard would become larger than ``most`` bytes."""
    shard, total = [], 0
    for name, size in sizes.items():
        if shard and total + size > most:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += size
    yield shard
