"""A recorded routing: which experts tokens visited, kept in one .npz file.

`moejax eval --record-routing=FILE` writes it, gate `replay` follows it, and anyone can read it:

    data = numpy.load("routing.npz")
    data["eval_expert"]   int32[layers, rows, positions, columns], by global row id from 0
    data["eval_weight"]   float32, the same shape; 0 where a column is inactive or padding
    data["eval_kept"]     bool, whether the pair found room
    data["eval_identity"] float32[layers, rows, positions], what the output keeps of the input: 0
                          but for gates that say so (BASE)
    data["eval_token"]    int32[rows, positions], the tokens that were routed
    data["eval_digest"]   uint64[rows], of all that a row of the data holds: see ``row_digests``
    data["about"]         JSON: num_experts, gate, step, the corpus's fingerprint, and ``sees``:
                          what the routing of a token may depend on besides its own sequence up
                          to itself, of "future" (later tokens) and "others" (other sequences)

and the same with ``train_`` for rows of the training data, where these were recorded too; they are
routed as in evaluation as well.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from moejax.record.files import replaced

FORMAT = 2
"""Raised when replay needs what older files lack."""

SEEN = ("future", "others")


class Routed(NamedTuple):
    """Rows [N] of a recorded data set, by MoE layer [M]."""

    expert: Int[np.ndarray, "M N L K"]
    weight: Float[np.ndarray, "M N L K"]
    kept: Bool[np.ndarray, "M N L K"]
    identity: Float[np.ndarray, "M N L"]
    token: Int[np.ndarray, "N L"]
    digest: UInt64[np.ndarray, " N"]


class Recording(NamedTuple):
    """What a file holds. ``train`` has no rows unless training data was recorded."""

    eval: Routed
    train: Routed
    about: dict[str, Any]

    @property
    def num_experts(self) -> int:
        return int(self.about["num_experts"])

    def sees(self, what: str) -> bool:
        """Whether the routing of a token may depend on this, of ``SEEN``."""
        return what in self.about["sees"]


def row_digests(batch: Mapping[str, np.ndarray]) -> UInt64[np.ndarray, " N"]:
    """What each row of a batch holds, its id aside, in 8 bytes: equal means the same row."""
    names = sorted(name for name in batch if name != "row")
    hashes = [hashlib.blake2b(digest_size=8) for _ in batch["row"]]
    for name in names:
        for at, row in zip(hashes, np.ascontiguousarray(batch[name]), strict=True):
            at.update(row.tobytes())
    return np.frombuffer(b"".join(at.digest() for at in hashes), "<u8").astype(np.uint64)


def save(path: str | Path, recording: Recording) -> None:
    """Writes a recording, in one rename.

    Raises:
      UserError: the disk takes no more, or the folder no file.
    """
    about = json.dumps(recording.about)
    arrays: dict[str, Any] = {"format": np.asarray(FORMAT), "about": np.asarray(about)}
    for split in ("eval", "train"):
        arrays |= {f"{split}_{k}": v for k, v in getattr(recording, split)._asdict().items()}
    with replaced(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: str) -> Recording:
    """The recording in a file; the last one read stays in memory.

    Raises:
      ValueError: there is none that can be read, in words that follow the file's name.
    """
    path = os.path.expanduser(path)
    try:
        return _load(path, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=1)
def _load(path: str, changed: int) -> Recording:
    del changed  # a part of the key: a file that is written again is read again
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            found_format = int(data["format"]) if "format" in data else 1
            if found_format == FORMAT:
                parts = {name: _part(data, name) for name in ("eval", "train")}
    except OSError:
        raise
    except Exception as error:  # of a garbled file NumPy, zipfile, zlib and tokenize raise a dozen
        raise ValueError("is not a routing that `moejax eval --record-routing` wrote") from error
    if found_format != FORMAT:
        raise ValueError(
            f"has recorded routing in format {found_format}, and this moejax reads {FORMAT}; "
            "record it again with `moejax eval --record-routing`"
        )
    found = Recording(**parts, about=about)
    problem = _problem(found)
    if problem:
        raise ValueError(f"is not a routing that can be followed: {problem}; record it again")
    return found


def _part(data: Mapping[str, np.ndarray], split: str) -> Routed:
    return Routed(*(data[f"{split}_{field}"] for field in Routed._fields))


def _problem(found: Recording) -> str:
    """What is wrong with what was read, in a few words; empty when all is well."""
    about = found.about
    if not isinstance(about, dict) or not isinstance(about.get("num_experts"), int):
        return "`about` names no num_experts"
    sees = about.get("sees")
    if not isinstance(sees, list) or not set(map(str, sees)) <= set(SEEN):
        return f"`about` has sees={sees!r}, not a list of {', '.join(SEEN)}"
    for split in ("eval", "train"):
        problem = _problem_of_part(getattr(found, split), found.num_experts)
        if problem:
            return f"{split}_{problem}"
    first, second = (getattr(found, split).expert.shape for split in ("eval", "train"))
    if (first[0], *first[2:]) != (second[0], *second[2:]):
        return f"eval_expert has shape {first}, but train_expert {second}"
    return ""


def _problem_of_part(part: Routed, num_experts: int) -> str:
    shape = part.expert.shape
    if len(shape) != 4 or not shape[0] or not shape[3]:
        return f"expert has shape {shape}, not [layers, rows, positions, columns]"
    fields = {"weight": (shape, "f"), "kept": (shape, "b"), "token": (shape[1:3], "iu")}
    fields |= {"identity": (shape[:3], "f"), "digest": (shape[1:2], "u")}
    for name, (expected, kinds) in {"expert": (shape, "iu"), **fields}.items():
        array = getattr(part, name)
        if array.shape != expected or array.dtype.kind not in kinds:
            return f"{name} is {array.dtype}{list(array.shape)}, not of shape {list(expected)}"
    if part.expert.size and not (0 <= part.expert.min() and part.expert.max() < num_experts):
        ids = f"{part.expert.min()} to {part.expert.max()}"
        return f"expert has ids {ids}, but num_experts={num_experts}"
    if not np.all(np.isfinite(part.weight) & (part.weight >= 0)):
        return "weight has numbers that are not finite or below 0"
    if not np.all(np.isfinite(part.identity)):
        return "identity has numbers that are not finite"
    # Inactive columns may repeat any id: each counts as a number of its own.
    own_K = -1 - np.arange(shape[3])
    sorted_MNLK = np.sort(np.where(part.weight > 0, part.expert, own_K), axis=-1)
    if np.any(sorted_MNLK[..., 1:] == sorted_MNLK[..., :-1]):
        return "expert names an expert twice for one token"
    return ""
