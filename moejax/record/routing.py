"""The routing of rows of tokens, and the file that keeps it.

`moejax eval --record-routing` writes the file, gate `replay` follows it, and anyone can read it:

    data = numpy.load("routing.npz")
    data["eval_expert"]   int32[layers, rows, positions, columns], by global row id from 0
    data["eval_weight"]   float32, the same shape; 0 where a column is inactive or padding
    data["eval_kept"]     bool, whether the pair had room
    data["eval_identity"] float32[layers, rows, positions], the share of the input that the output
                          keeps: 0 except for gates that keep some (BASE)
    data["eval_token"]    int32[rows, positions], the tokens that were routed
    data["eval_digest"]   uint64[rows], of all that a row of the data holds: see ``row_digests``
    data["about"]         JSON: num_experts, gate, step, the corpus's fingerprint, and ``sees``:
                          what the routing of a token may depend on besides its own sequence up
                          to itself, of "future" (later tokens) and "others" (other sequences)

and the same with ``train_`` for rows of the training data, if these were recorded too; they are
also routed as in evaluation.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from moejax.record.counts import NONE, first_choice, selected
from moejax.record.files import replaced

FORMAT = 2
"""Raised when replay needs what older files lack."""

SEES = ("future", "others")


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """The routing of N rows of L positions in M MoE layers, with K columns per token.

    ``weight_MNLK`` is 0 where a column is inactive; ``kept_MNLK`` says whether the pair had room.
    The rest is optional: ``label_NL``, the domain of each token as an index into ``names``;
    ``identity_MNL``, the share of the input that each output keeps; digests of the rows; ``step``,
    the completed updates of the model that routed them.
    """

    expert_MNLK: Int[np.ndarray, "M N L K"]
    weight_MNLK: Float[np.ndarray, "M N L K"]
    kept_MNLK: Bool[np.ndarray, "M N L K"]
    token_NL: Int[np.ndarray, "N L"]
    valid_NL: Bool[np.ndarray, "N L"]
    num_experts: int
    label_NL: Int[np.ndarray, "N L"] | None = None
    names: tuple[str, ...] = ()
    identity_MNL: Float[np.ndarray, "M N L"] | None = None
    digest_N: UInt64[np.ndarray, " N"] | None = None
    step: int = 0

    @property
    def layers(self) -> range:
        return range(self.expert_MNLK.shape[0])

    @property
    def rows(self) -> int:
        return self.expert_MNLK.shape[1]

    @property
    def active_MNLK(self) -> Bool[np.ndarray, "M N L K"]:
        """True where the pair was chosen."""
        return (self.weight_MNLK > 0) & self.valid_NL[..., None]

    def choices(self, layer: int) -> Int[np.ndarray, "N L K"]:
        """The experts of a layer's tokens; `NONE` in inactive columns."""
        return np.where(self.active_MNLK[layer], self.expert_MNLK[layer], NONE)

    def first(self, layer: int) -> Int[np.ndarray, "N L"]:
        """The expert with the largest weight of each token; `NONE` for a token without any."""
        weight_NLK = np.where(self.active_MNLK[layer], self.weight_MNLK[layer], 0.0)
        return first_choice(self.expert_MNLK[layer], weight_NLK)

    @functools.cached_property
    def selected_MTE(self) -> Bool[np.ndarray, "M T E"]:
        """True where one of the T valid tokens chose an expert."""
        expert_MTK, weight_MTK = self._of_valid_tokens()
        layers = zip(expert_MTK, weight_MTK, strict=True)
        return np.stack([selected(*layer, self.num_experts) for layer in layers])

    @functools.cached_property
    def first_MT(self) -> Int[np.ndarray, "M T"]:
        """The expert of largest weight of each of the T valid tokens; `NONE` without any."""
        return first_choice(*self._of_valid_tokens())

    def _of_valid_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        return self.expert_MNLK[:, self.valid_NL], self.weight_MNLK[:, self.valid_NL]

    def select(self, row_n: Int[np.ndarray, " n"]) -> "Routed":
        """Some of the rows."""

        def rows(array: np.ndarray | None) -> Any:
            return None if array is None else array[row_n]

        return dataclasses.replace(
            self,
            expert_MNLK=self.expert_MNLK[:, row_n],
            weight_MNLK=self.weight_MNLK[:, row_n],
            kept_MNLK=self.kept_MNLK[:, row_n],
            token_NL=self.token_NL[row_n],
            valid_NL=self.valid_NL[row_n],
            label_NL=rows(self.label_NL),
            identity_MNL=None if self.identity_MNL is None else self.identity_MNL[:, row_n],
            digest_N=rows(self.digest_N),
        )


class Recording(NamedTuple):
    """The content of a file. ``train`` has no rows unless training data was recorded."""

    eval: Routed
    train: Routed
    about: dict[str, Any]

    @property
    def num_experts(self) -> int:
        return int(self.about["num_experts"])

    def sees(self, what: str) -> bool:
        """True if the routing of a token may depend on this, of ``SEES``."""
        return what in self.about["sees"]


FIELDS = {
    "expert": "expert_MNLK",
    "weight": "weight_MNLK",
    "kept": "kept_MNLK",
    "identity": "identity_MNL",
    "token": "token_NL",
    "digest": "digest_N",
}
"""The fields of `Routed` that a file holds, by their names there."""


def from_arrays(arrays: Mapping[str, np.ndarray], num_experts: int) -> Routed:
    """The rows with the arrays of `FIELDS`. All positions count as valid: padding has weight 0."""
    fields: dict[str, Any] = {FIELDS[name]: array for name, array in arrays.items()}
    valid_NL = np.ones(arrays["token"].shape, bool)
    return Routed(**fields, valid_NL=valid_NL, num_experts=num_experts)


def row_digests(batch: Mapping[str, np.ndarray]) -> UInt64[np.ndarray, " N"]:
    """8 bytes for the content of each row of a batch: equal means the same row.

    Without its id, and without experts that were chosen for it.
    """
    names = sorted(name for name in batch if name not in ("row", "experts"))
    hashes = [hashlib.blake2b(digest_size=8) for _ in batch["row"]]
    for name in names:
        for digest, row in zip(hashes, np.ascontiguousarray(batch[name]), strict=True):
            digest.update(row.tobytes())
    return np.frombuffer(b"".join(digest.digest() for digest in hashes), "<u8").astype(np.uint64)


def save(path: str | Path, recording: Recording) -> None:
    """Writes a recording, in one rename.

    Raises:
      UserError: the disk is full, or the folder cannot be written to.
    """
    about = json.dumps(recording.about)
    arrays: dict[str, Any] = {"format": np.asarray(FORMAT), "about": np.asarray(about)}
    for split in ("eval", "train"):
        routed = getattr(recording, split)
        arrays |= {f"{split}_{name}": getattr(routed, field) for name, field in FIELDS.items()}
    with replaced(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: str) -> Recording:
    """The recording in a file; the last one read stays in memory.

    Raises:
      ValueError: the file holds none; the message follows the file's name.
    """
    path = os.path.expanduser(path)
    try:
        return _load(path, os.stat(path).st_mtime_ns)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=1)
def _load(path: str, changed: int) -> Recording:
    del changed  # a part of the key: a file that is written again is read again
    splits: dict[str, dict[str, np.ndarray]] = {}
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            stored = int(data["format"]) if "format" in data else 1
            if stored == FORMAT:
                for split in ("eval", "train"):
                    splits[split] = {name: data[f"{split}_{name}"] for name in FIELDS}
    except OSError:
        raise
    except Exception as error:  # NumPy, zipfile, zlib and tokenize raise a dozen for a garbled file
        raise ValueError(
            "is not a routing that `moejax eval --record-routing` wrote (a file of expert ids "
            "without weights is for moe.replay)"
        ) from error
    if stored != FORMAT:
        raise ValueError(
            f"has recorded routing in format {stored}, and this moejax reads {FORMAT}; "
            "record it again with `moejax eval --record-routing`"
        )
    if problem := _problem(about, splits):
        raise ValueError(f"is not a routing that can be followed: {problem}; record it again")
    rows = {name: from_arrays(x, about["num_experts"]) for name, x in splits.items()}
    return Recording(rows["eval"], rows["train"], about)


def _problem(about: Any, splits: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The first fault of a file's content, in a few words; empty if there is none."""
    if not isinstance(about, dict) or not isinstance(about.get("num_experts"), int):
        return "`about` names no num_experts"
    sees = about.get("sees")
    if not isinstance(sees, list) or not set(map(str, sees)) <= set(SEES):
        return f"`about` has sees={sees!r}, not a list of {', '.join(SEES)}"
    for split, arrays in splits.items():
        if problem := _problem_of_split(arrays, about["num_experts"]):
            return f"{split}_{problem}"
    first, second = (arrays["expert"].shape for arrays in splits.values())
    if (first[0], *first[2:]) != (second[0], *second[2:]):
        return f"eval_expert has shape {first}, but train_expert {second}"
    return ""


def _problem_of_split(arrays: Mapping[str, np.ndarray], num_experts: int) -> str:
    expert, weight = arrays["expert"], arrays["weight"]
    shape = expert.shape
    if len(shape) != 4 or not shape[0] or not shape[3]:
        return f"expert has shape {shape}, not [layers, rows, positions, columns]"
    fields = {"weight": (shape, "f"), "kept": (shape, "b"), "token": (shape[1:3], "iu")}
    fields |= {"identity": (shape[:3], "f"), "digest": (shape[1:2], "u")}
    for name, (expected, kinds) in {"expert": (shape, "iu"), **fields}.items():
        array = arrays[name]
        if array.shape != expected or array.dtype.kind not in kinds:
            return f"{name} is {array.dtype}{list(array.shape)}, not of shape {list(expected)}"
    if expert.size and not (0 <= expert.min() and expert.max() < num_experts):
        return f"expert has ids {expert.min()} to {expert.max()}, but num_experts={num_experts}"
    if not np.all(np.isfinite(weight) & (weight >= 0)):
        return "weight has numbers that are not finite or below 0"
    if not np.all(np.isfinite(arrays["identity"])):
        return "identity has numbers that are not finite"
    # Inactive columns may repeat any id: each counts as a number of its own.
    own_K = -1 - np.arange(shape[3])
    sorted_MNLK = np.sort(np.where(weight > 0, expert, own_K), axis=-1)
    if np.any(sorted_MNLK[..., 1:] == sorted_MNLK[..., :-1]):
        return "expert names an expert twice for one token"
    return ""
