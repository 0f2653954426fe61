"""How far a run is, read off the ends of ``metrics.jsonl`` and ``timings.jsonl``, while it runs."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Progress:
    """Of a run that has logged nothing yet: step 0, and None."""

    step: int = 0
    """Of the last row, which stands for completed updates."""
    loss: float | None = None
    """Of the last training row, nats per token."""
    seconds_per_step: float | None = None
    """Of the last logged interval that has a time."""

    def seconds_left(self, steps: int) -> float | None:
        """Until the last step at the present rate, without evaluations; None if not known."""
        if self.seconds_per_step is None:
            return None
        return max(0, steps - self.step) * self.seconds_per_step


def read(workdir: Path) -> Progress:
    """A run may be at work: files may be missing, growing, cut back, or have a torn last line."""
    row, train = _last(workdir / "metrics.jsonl"), _last(workdir / "metrics.jsonl", "train")
    timing = _last(workdir / "timings.jsonl")
    seconds = float(timing.get("seconds_per_step", math.nan))
    return Progress(
        step=int(row.get("step", 0)),
        loss=float(train["loss"]) if "loss" in train else None,
        seconds_per_step=seconds if math.isfinite(seconds) else None,
    )


def _last(path: Path, split: str = "") -> dict[str, Any]:
    """The last whole row (of a split), empty if there is none; reads no more than it needs."""
    size = _BLOCK
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while True:
                start = max(0, end - size)
                file.seek(start)
                pieces = file.read(end - start).split(b"\n")
                for line in reversed(pieces[start > 0 : -1]):  # without cut ones at both ends
                    row = _row(line)
                    if row and split in ("", row.get("split")):
                        return row
                if start == 0:
                    return {}
                size *= 8
    except FileNotFoundError:
        return {}


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}
