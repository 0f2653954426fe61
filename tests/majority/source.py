"""All vectors of a number of bits, and whether most of the bits are ones."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from moejax.data.batches import TrainBatches, heldout_batches
from moejax.data.source import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class MajoritySource:
    """A batch: ``bit`` int32[B, L], ``majority`` int32[B], ``valid`` bool[B], ``row`` int32[B]."""

    bits: int
    eval_fraction: float
    batch_size: int
    seed: int

    @functools.cached_property
    def _sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers to train on and those held out."""
        mixed = np.random.default_rng(0).permutation(2**self.bits)
        count = round(self.eval_fraction * len(mixed))
        return mixed[count:], mixed[:count]

    def _read(self, number_N: np.ndarray) -> Any:
        def read(row_B: np.ndarray, position_B: np.ndarray) -> Batch:
            bit_BL = number_N[row_B, None] >> np.arange(self.bits) & 1
            return {
                "bit": bit_BL.astype(np.int32),
                "majority": (2 * bit_BL.sum(axis=1) > self.bits).astype(np.int32),
                "valid": np.ones(len(row_B), dtype=bool),
            }

        return read

    @property
    def name(self) -> str:
        return f"majority of {self.bits} bits"

    @property
    def fingerprint(self) -> str:
        return f"majority {self.bits} {self.eval_fraction}"

    @functools.cached_property
    def _train(self) -> TrainBatches:
        train_N, _ = self._sides
        return TrainBatches(len(train_N), self.batch_size, self.seed, self._read(train_N))

    def size(self) -> tuple[int, int]:
        train_N, heldout_N = self._sides
        return len(train_N), len(heldout_N)

    def shapes(self, rows: int) -> Batch:
        return {
            "bit": np.zeros((rows, self.bits), np.int32),
            "majority": np.zeros(rows, np.int32),
            "valid": np.zeros(rows, np.bool_),
            "row": np.zeros(rows, np.int32),
        }

    def train_batch(self, step: int) -> Batch:
        return self._train.batch(step)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        _, heldout_N = self._sides
        return heldout_batches(len(heldout_N), batch_size, rows, self._read(heldout_N))

    def baselines(self) -> dict[str, float]:
        return {"chance": math.log(2)}

    def about(self) -> dict[str, Any]:
        return {}

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return np.full(vocab_size, self.bits * 2 ** (self.bits - 1), np.int64)

    def tokens(self, batch: Batch) -> np.ndarray:
        return batch["bit"]

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        shape = batch["bit"].shape
        return {
            "token": batch["bit"],
            "target": np.broadcast_to(2 + batch["majority"][:, None], shape),
            "valid": np.broadcast_to(batch["valid"][:, None], shape),
            "row": batch["row"],
            "token_text": ["0", "1", "mostly 0", "mostly 1"],
        }
