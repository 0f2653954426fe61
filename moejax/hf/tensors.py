"""Folders of safetensors files, as Hugging Face lays them out: read in slices, written in shards.

    model.safetensors                     everything in one file, or
    model.safetensors.index.json          {"weight_map": {"model.norm.weight": FILE, ...}}
    model-00001-of-00003.safetensors

Files are mapped into memory, and a tensor or a slice of it is copied when it is read. No pickle is
ever read: a `.bin` or `.pt` file is refused.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from moejax.errors import UserError
from moejax.record.files import replaced, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights, by their names in the format."""
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
        self._file_of: dict[str, str] = {}
        for name, file in self._files.items():
            for tensor in file.keys():
                self._add(tensor, name)
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

    def _add(self, tensor: str, name: str) -> None:
        if tensor in self._file_of:
            other = self._file_of[tensor]
            self._stack.close()
            raise UserError(
                f"{self.folder}: tensor {tensor!r} is in {other} and in {name}; they are files of "
                "different models, so download the model into an empty folder"
            )
        self._file_of[tensor] = name

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
            raise _pickled(self.folder / pickled[0])
        raise UserError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}; name the folder of a Hugging Face "
            "model"
        )

    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            outside = [name for name in weights.values() if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"{path} is not an index of tensors ({type(error).__name__}: {error}); download it "
                "again"
            ) from error
        if outside:
            raise UserError(f"{path} names {outside[0]!r}, which is not a file beside it")
        return weights

    def _opened(self, name: str) -> Any:
        path = self.folder / name
        if any(path.match(kind) for kind in PICKLED):
            raise _pickled(path)
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


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run any program when it is read; save the model as "
        "safetensors (save_pretrained of transformers does)"
    )


@dataclasses.dataclass(frozen=True)
class Described:
    """The type, in the words of the format, and the shape of a tensor that is to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_folder(
    folder: str | Path,
    tensors: Mapping[str, Described],
    value: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors in their order, one at a time, and the index if there are several files.

    Args:
      value: gives a tensor by name; one at a time is in memory.

    Raises:
      UserError: a file cannot be written.
    """
    folder = Path(folder)
    shards = list(_shards(tensors, shard_bytes))
    files = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        for i in range(len(shards))
    ]
    for file, names in zip(files, shards, strict=True):
        with replaced(folder / file) as temporary, open(temporary, "wb") as out:
            _write_shard(out, {name: tensors[name] for name in names}, value)
    if len(shards) > 1:
        weights = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})


def _write_shard(
    out: BinaryIO, tensors: Mapping[str, Described], value: Callable[[str], np.ndarray]
) -> None:
    """One file: the length of its header, the header, the tensors one after the other.

    The library's own writer holds two copies of a whole file in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
        x = np.asarray(value(name), DTYPES[tensor.dtype], order="C")
        assert x.shape == tensor.shape, (name, x.shape, tensor.shape)
        out.write(x.reshape(-1).view(np.uint8).data)


def _shards(tensors: Mapping[str, Described], most: int) -> Iterator[list[str]]:
    """Names, cut where a shard would become larger than ``most`` bytes."""
    shard, total = [], 0
    for name, tensor in tensors.items():
        if shard and total + tensor.nbytes > most:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += tensor.nbytes
    yield shard
