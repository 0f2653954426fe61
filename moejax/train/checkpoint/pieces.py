"""Checkpoints written and read piece by piece, for models that are larger than the host's memory.

The files are those that `checkpointer.py` writes and `restore.py` reads: arrays by path, and the
manifest with their checksums. A checksum is a sum over elements, so it adds up over pieces.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from moejax.record import files
from moejax.train.checkpoint.checksum import block_sums, digest
from moejax.train.checkpoint.manifest import Entry, Manifest, encode

Index = tuple[int, ...]
"""The position of a piece: it holds the trailing axes at these places of the leading ones."""


class PieceWriter:
    """Writes the checkpoint of a step; it appears, complete, when the block ends without an error.

    Args:
      directory: of the checkpoints.
      arrays: shape and type of every array, by path.
      leading: the number of axes of an array that index its pieces (0: one piece).
      meta: a JSON object, as `Checkpointer.save` takes it.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        arrays: Mapping[str, jax.ShapeDtypeStruct],
        leading: Mapping[str, int],
        meta: Mapping[str, Any],
    ):
        self._directory, self._step, self._meta = directory, step, dict(meta)
        self._arrays, self._leading = dict(arrays), dict(leading)
        self._partial = directory / f"{step}.partial"
        self._stores: dict[str, ts.TensorStore] = {}
        self._sums = {name: np.zeros(2, np.uint32) for name in arrays}
        self._missing = {
            name: math.prod(x.shape[: leading.get(name, 0)]) for name, x in arrays.items() if x.size
        }

    def __enter__(self) -> "PieceWriter":
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stores.clear()
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        left = [name for name, count in self._missing.items() if count]
        assert not left, f"pieces of {left} were not written"
        entries = {
            name: Entry(tuple(x.shape), str(x.dtype), digest(self._sums[name]))
            for name, x in self._arrays.items()
        }
        about = encode(Manifest(self._step, entries, self._meta))
        (self._partial / "meta").mkdir()
        files.write_json(self._partial / "meta" / "metadata", about)
        self._partial.rename(self._directory / str(self._step))

    def put(self, name: str, index: Index, piece: np.ndarray) -> None:
        """Writes a piece of an array, in the array's type."""
        x, lead = self._arrays[name], self._leading.get(name, 0)
        assert len(index) == lead and piece.shape == x.shape[lead:], (name, index, piece.shape)
        if not x.size:
            return
        piece = np.asarray(piece, x.dtype, order="C")
        self._store(name)[index].write(piece).result()
        start = [np.uint32(i) for i in (*index, *(0 for _ in piece.shape))]
        self._sums[name] += block_sums(piece.reshape((1,) * lead + piece.shape), start, x.shape)
        self._missing[name] -= 1

    def _store(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            x, lead = self._arrays[name], self._leading.get(name, 0)
            chunk = [1] * lead + list(x.shape[lead:])
            spec = _spec(self._partial / "state", name) | {
                "driver": "zarr",
                "metadata": {"shape": x.shape, "chunks": chunk, "compressor": None},
            }
            dtype = ts.dtype(np.dtype(x.dtype))
            self._stores[name] = ts.open(spec, create=True, dtype=dtype).result()
        return self._stores[name]


class PieceReader:
    """Reads arrays of a checkpoint a piece at a time; checksums are not verified."""

    def __init__(self, folder: Path):
        self._folder = folder / "state"
        self._stores: dict[str, ts.TensorStore] = {}

    def read(self, name: str, index: Sequence[int] = ()) -> np.ndarray:
        """The trailing axes at these places of the leading ones."""
        if name not in self._stores:
            spec = _spec(self._folder, name) | {"driver": "auto"}
            self._stores[name] = ts.open(spec, open=True, read=True).result()
        return self._stores[name][tuple(index)].read().result()


def _spec(folder: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
