"""How far a run is, read off the ends of ``metrics.jsonl`` and ``timings.jsonl``, while it runs."""

import dataclasses
import math
from pathlib import Path

from moejax.config.saved import METRICS, TIMINGS
from moejax.record.files import last_row


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
    row, train = last_row(workdir / METRICS), last_row(workdir / METRICS, "train")
    timing = last_row(workdir / TIMINGS)
    seconds = float(timing.get("seconds_per_step", math.nan))
    return Progress(
        step=int(row.get("step", 0)),
        loss=float(train["loss"]) if "loss" in train else None,
        seconds_per_step=seconds if math.isfinite(seconds) else None,
    )
