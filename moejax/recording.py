"""A recorded routing: which experts tokens visited, kept in one .npz file.

`moejax eval --record-routing=FILE` writes it, gate `replay` follows it, and anyone can read it:

    data = numpy.load("routing.npz")
    data["eval_expert"]   int32[layers, rows, positions, columns], by global row id from 0
    data["eval_weight"]   float32, the same shape; 0 where a column is inactive or padding
    data["eval_kept"]     bool, whether the pair found room
    data["eval_token"]    int32[rows, positions], the tokens that were routed
    data["about"]         JSON: num_experts, gate, step, and the corpus's fingerprint

and the same with ``train_`` for rows of the training data, where these were recorded too.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.errors import UserError


class Routed(NamedTuple):
    """Rows [N] of a recorded data set, by MoE layer [M]."""

    expert: Int[np.ndarray, "M N L K"]
    weight: Float[np.ndarray, "M N L K"]
    kept: Bool[np.ndarray, "M N L K"]
    token: Int[np.ndarray, "N L"]


class Recording(NamedTuple):
    """What a file holds. ``train`` has no rows unless training data was recorded."""

    eval: Routed
    train: Routed
    about: dict[str, Any]

    @property
    def num_experts(self) -> int:
        return int(self.about["num_experts"])


def save(path: str | Path, recording: Recording) -> None:
    """Writes a recording, in one rename."""
    arrays: dict[str, Any] = {"about": np.asarray(json.dumps(recording.about))}
    for split in ("eval", "train"):
        arrays |= {f"{split}_{k}": v for k, v in getattr(recording, split)._asdict().items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


def load(path: str) -> Recording:
    """The recording in a file; the last one read stays in memory.

    Raises:
      ValueError: there is none that can be read, in words that follow the file's name.
    """
    try:
        return _load(path, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=1)
def _load(path: str, changed: int) -> Recording:
    del changed  # a part of the key: a file that is written again is read again
    try:
        with np.load(path, allow_pickle=False) as data:
            parts = {name: _part(data, name) for name in ("eval", "train")}
            return Recording(**parts, about=json.loads(str(data["about"])))
    except (KeyError, ValueError, EOFError, UserError) as error:
        raise ValueError("is not a routing that `moejax eval --record-routing` wrote") from error


def _part(data: Mapping[str, np.ndarray], split: str) -> Routed:
    return Routed(*(data[f"{split}_{field}"] for field in Routed._fields))
