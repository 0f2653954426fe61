"""A token stream as rows: windows of ``seq_len + 1`` tokens with stride ``seq_len``.

Inputs ``tokens[:, :-1]`` and targets ``tokens[:, 1:]`` are one shift apart, and every token after
the first is a target exactly once an epoch.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from moejax.data.batches import TrainBatches, heldout_batches
from moejax.data.joined import Tokens
from moejax.data.source import Batch
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Rows of a token stream, which may be memory-mapped; ``side`` names it in errors.

    Raises UserError if the stream is too short for one row.
    """

    tokens_N: Tokens
    seq_len: int
    side: str

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"train.seq_len: {self.seq_len} must be at least 1")
        if len(self) < 1:
            more = "give more text in data.path"
            if self.side == "held-out":
                more = "raise data.eval_fraction or " + more
            raise UserError(
                f"train.seq_len: the {self.side} text has {len(self.tokens_N)} tokens, but one row "
                f"of train.seq_len={self.seq_len} needs {self.seq_len + 1}; lower train.seq_len or "
                f"{more}"
            )

    def __len__(self) -> int:
        """Full rows of the stream."""
        return max(len(self.tokens_N) - 1, 0) // self.seq_len

    def read(self, row_B: Int64[np.ndarray, " B"], position_B: Int64[np.ndarray, " B"]) -> Batch:
        """``tokens`` int32 [B, L+1] and ``valid`` bool [B, L], all true."""
        tokens_BL = np.empty((len(row_B), self.seq_len + 1), dtype=np.int32)
        for i, row in enumerate(row_B):
            begin = int(row) * self.seq_len
            tokens_BL[i] = self.tokens_N[begin : begin + self.seq_len + 1]
        return {"tokens": tokens_BL, "valid": np.ones((len(row_B), self.seq_len), dtype=bool)}

    def places(self, row_B: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B L"]:
        """The place of each input in the stream."""
        return row_B[:, None] * self.seq_len + np.arange(self.seq_len)


def train_windows(tokens_N: Tokens, seq_len: int, batch_size: int, seed: int) -> TrainBatches:
    """Training batches of a token stream."""
    windows = Windows(tokens_N, seq_len, "training")
    return TrainBatches(len(windows), batch_size, seed, windows.read)


def heldout_windows(tokens_N: Tokens, seq_len: int, batch_size: int, rows: int) -> list[Batch]:
    """Held-out batches of a token stream: see ``heldout_batches``."""
    windows = Windows(tokens_N, seq_len, "held-out")
    return heldout_batches(len(windows), batch_size, rows, windows.read)
