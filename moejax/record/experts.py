"""Expert ids that were chosen elsewhere: the file that `moe.replay` reads, and its makers.

Inference engines return the experts that they used (vLLM's and SGLang's ``routed_experts``), so
that training can use the same ones: routing replay, R3 (arXiv 2510.11370). The file:

    data = numpy.load("experts.npz")
    data["tokens"]    int[rows, L], the input tokens of each row
    data["experts"]   int[rows, L, layers, k], their experts in any order, by layer from the bottom

``layers`` are the model's MoE layers, or all its layers (what engines return): the ids of dense
layers are then ignored. A token whose k ids are all -1 in a layer follows the router there. A row
is found by its tokens, wherever it occurs in the data; two rows with the same tokens must have the
same experts. A file of `moejax eval --record-routing` is read too.

Engines return [n - 1, layers, k] for a sequence of n tokens, whose last one was never an input:
``rows_of`` makes the arrays from such samples. Megatron's router replay has one [tokens, k] per
layer: ``numpy.stack(them, axis=1)``.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from moejax.record import routing
from moejax.record.files import replaced

ABSENT = -1
"""All ids of a token that follows the router."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """The experts of rows, which are found by their tokens."""

    token_NL: Int[np.ndarray, "N L"]
    expert_NLMK: Int[np.ndarray, "N L M K"]

    def __post_init__(self) -> None:
        places = {}
        for index, row in enumerate(self.token_NL):
            places.setdefault(row.tobytes(), index)
        object.__setattr__(self, "_places", places)

    def find(self, token_BL: Int[np.ndarray, "B L"]) -> Int[np.ndarray, " B"]:
        """The place of each row here; -1 for a row that is not."""
        rows = np.ascontiguousarray(token_BL, dtype=np.int32)
        places: dict[bytes, int] = getattr(self, "_places")  # noqa: B009 (no field: it is derived)
        return np.array([places.get(row.tobytes(), -1) for row in rows], dtype=np.int64)

    def of(self, token_BL: Int[np.ndarray, "B L"]) -> Int[np.ndarray, "B L M K"]:
        """The experts of rows; `ABSENT` for a row that is not here."""
        place_B = self.find(token_BL)
        found = place_B[:, None, None, None] >= 0
        return np.where(found, self.expert_NLMK[np.maximum(place_B, 0)], ABSENT).astype(np.int32)


def save(
    path: str | Path, tokens: Int[np.ndarray, "N L"], experts: Int[np.ndarray, "N L M K"]
) -> None:
    """Writes a file, in one rename.

    Raises:
      ValueError: arrays that do not belong together.
      UserError: the file cannot be written.
    """
    _checked(np.asarray(tokens), np.asarray(experts))
    with replaced(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, tokens=tokens, experts=experts)


def rows_of(
    samples: Iterable[tuple[Sequence[int], Int[np.ndarray, "n M K"]]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """``tokens`` and ``experts`` of a file, from sequences of tokens and their experts.

    A sequence of n tokens has the experts of its first n - 1 tokens, or of all. It fills a row of
    ``length`` tokens; a shorter one is filled up with tokens 0 that have no experts.

    Raises:
      ValueError: a sample that is longer, or whose tokens and experts differ in number.
    """
    token_NL, expert_NLMK = [], []
    for number, (tokens, experts) in enumerate(samples):
        expert_nMK = np.asarray(experts)
        if expert_nMK.ndim != 3 or len(expert_nMK) not in (len(tokens) - 1, len(tokens)):
            raise ValueError(
                f"sample {number} has {len(tokens)} tokens and experts {list(expert_nMK.shape)}, "
                "not [n - 1 or n, layers, k]"
            )
        used = min(len(expert_nMK), len(tokens))
        if used > length:
            raise ValueError(f"sample {number} has {used} tokens, more than length={length}")
        missing = length - used
        token_NL.append(np.pad(np.asarray(tokens[:used], np.int32), (0, missing)))
        fill = ((0, missing), (0, 0), (0, 0))
        signed = expert_nMK[:used].astype(np.int32)
        expert_NLMK.append(np.pad(signed, fill, constant_values=ABSENT))
    if not token_NL:
        raise ValueError("there are no samples")
    return np.stack(token_NL), np.stack(expert_NLMK)


def load(path: str) -> Choices:
    """The choices in a file.

    Raises:
      ValueError: it holds none; the message follows the file's name.
    """
    path = os.path.expanduser(path)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            names = set(data.files)
            if "experts" in names and "tokens" in names:
                return _checked(data["tokens"], data["experts"])
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except _Wrong:
        raise
    except Exception as error:  # NumPy, zipfile, zlib and tokenize raise a dozen for a garbled file
        raise ValueError("is not a NumPy archive (.npz) that can be read") from error
    if "about" not in names:
        raise ValueError(
            f"has the arrays {', '.join(sorted(names)) or 'none'}, not `tokens` and `experts`; "
            "write it with moejax.record.experts.save"
        )
    return of_recording(routing.load(path))


def of_recording(recording: routing.Recording) -> Choices:
    """The choices in a recording of our own.

    Raises:
      ValueError: they depend on later tokens or other rows, or on more or fewer experts by token.
    """
    if recording.about["sees"]:
        raise ValueError(
            f"was recorded with gate {recording.about.get('gate')!r}, whose choice depends on "
            f"{' and '.join(recording.about['sees'])} tokens; use moe.gate.name=replay"
        )
    parts = [part for part in (recording.train, recording.eval) if part.rows]
    active = np.concatenate([part.weight_MNLK > 0 for part in parts], axis=1)
    expert = np.concatenate([part.expert_MNLK for part in parts], axis=1)
    if np.any(active.any(axis=-1) & ~active.all(axis=-1)):
        raise ValueError(
            "has tokens that visit fewer experts than others, which a gate with k experts per "
            "token cannot follow; use moe.gate.name=replay"
        )
    chosen = np.moveaxis(np.where(active, expert, ABSENT), 0, 2)
    return _checked(np.concatenate([part.token_NL for part in parts]), chosen)


def fitted(
    choices: Choices, sparse: Sequence[int], num_layers: int, k: int, num_experts: int, length: int
) -> Choices:
    """The choices of a model's MoE layers, which are the layers ``sparse`` of ``num_layers``.

    Raises:
      ValueError: they do not fit the model; the message follows the file's name.
    """
    rows, positions, layers, columns = choices.expert_NLMK.shape
    if positions != length:
        raise ValueError(f"has rows of {positions} tokens, but train.seq_len={length}")
    if columns != k:
        raise ValueError(f"has {columns} experts per token, but moe.gate.k={k}")
    expert = choices.expert_NLMK
    if layers == num_layers != len(sparse):
        expert = expert[:, :, list(sparse)]
    elif layers != len(sparse):
        raise ValueError(
            f"has {layers} layers, but the model has {len(sparse)} with experts, of {num_layers}"
        )
    problem = problem_of_experts(expert, np.ones((rows, positions), bool), num_experts)
    if problem:
        raise ValueError(problem)
    return Choices(choices.token_NL, expert)


def problem_of_experts(
    expert_NLMK: Int[np.ndarray, "N L M K"], valid_NL: Bool[np.ndarray, "N L"], num_experts: int
) -> str:
    """The first mistake in the ids of valid tokens, in a few words; empty if there is none."""
    expert_TMK = expert_NLMK[valid_NL]
    present_TM = ~np.all(expert_TMK == ABSENT, axis=-1)
    ids_NK = expert_TMK[present_TM]
    if not ids_NK.size:
        return ""
    low, high = ids_NK.min(), ids_NK.max()
    if low < 0 or high >= num_experts:
        return (
            f"has ids {low} to {high}, but num_experts={num_experts}; ids begin at 0, and -1 marks "
            "a token only if all its ids are -1"
        )
    ordered_NK = np.sort(ids_NK, axis=-1)
    if np.any(ordered_NK[:, 1:] == ordered_NK[:, :-1]):
        return "names an expert twice for one token in one layer"
    return ""


class _Wrong(ValueError):
    """Arrays that do not belong together."""


def _checked(token_NL: np.ndarray, expert_NLMK: np.ndarray) -> Choices:
    if token_NL.ndim != 2 or token_NL.dtype.kind not in "iu" or not len(token_NL):
        raise _Wrong(f"has tokens {token_NL.dtype}{list(token_NL.shape)}, not int[rows, L]")
    fits = expert_NLMK.ndim == 4 and expert_NLMK.shape[:2] == token_NL.shape
    if not fits or expert_NLMK.dtype.kind not in "iu" or not expert_NLMK.size:
        raise _Wrong(
            f"has experts {expert_NLMK.dtype}{list(expert_NLMK.shape)} for tokens "
            f"{list(token_NL.shape)}, not int[rows, L, layers, k]"
        )
    choices = Choices(token_NL.astype(np.int32), expert_NLMK.astype(np.int32))
    first_N = choices.find(choices.token_NL)
    differ_N = np.any(choices.expert_NLMK != choices.expert_NLMK[first_N], axis=(1, 2, 3))
    if differ_N.any():
        raise _Wrong(
            f"has rows {first_N[np.argmax(differ_N)]} and {np.argmax(differ_N)} with the same "
            "tokens and different experts"
        )
    return choices
