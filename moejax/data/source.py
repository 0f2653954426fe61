"""What a task learns from: the contract between data and the training loop."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
"""Arrays that lead with rows. Every batch has ``valid`` (bool[B] or bool[B, L]) and ``row``
(int32[B], global ids); the rest is between a source and its task."""


class Source(Protocol):
    """Training and held-out rows, the same for everyone who asks.

    Attributes:
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      fingerprint: SHA-256 over all there is to learn from; equal means the same data.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def size(self) -> tuple[int, int]:
        """Items to train on and held out: tokens of text, images, examples."""
        ...

    def shapes(self, rows: int) -> Batch:
        """A batch of ``rows`` rows of zeros: the element types and shapes of every batch."""
        ...

    def train_batch(self, step: int) -> Batch:
        """The batch of one step: a pure function of the step."""
        ...

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        """At most ``rows`` held-out rows, evenly spread, always the same; the last batch is filled
        up with rows that are not ``valid``. ``row`` counts the rows of this list."""
        ...

    def baselines(self) -> dict[str, float]:
        """Losses to compare with, by name, of the very rows that an evaluation sees; the first
        call may take a second."""
        ...

    def about(self) -> dict[str, Any]:
        """What else config.json should say of the data."""
        ...

    def eval_extras(self, loss: float) -> dict[str, float]:
        """What else an evaluation's row should say of its loss, such as bits per byte."""
        ...

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token id occurs in training, int64[V], for gates that hash tokens."""
        ...

    def tokens(self, batch: Batch) -> np.ndarray:
        """The ids that gates and recordings know the batch's tokens by, int32[B, L]."""
        ...

    def told(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """What the probe's ``tokens.npz`` says of rows of ``eval_batches(_, eval_rows)``, told by
        their ``row``: see ``moejax.record.probe.TOKENS``."""
        ...


@runtime_checkable
class Remarks(Protocol):
    """A source that has something to say at the start of a run; may take seconds."""

    def facts(self) -> dict[str, str]:
        """Lines under a heading each."""
        ...

    def warnings(self) -> list[str]:
        """What may be a mistake, a line each."""
        ...


FEW_ROWS = 100
"""Held-out examples below which a run warns: a share of so many has a standard error of up to 5 %.
"""


def few_rows(rows: int, item: str) -> list[str]:
    """The warning of a small held-out side, if it is one."""
    if rows >= FEW_ROWS:
        return []
    return [
        f"only {rows} {item}s are held out, and a held-out loss of fewer than {FEW_ROWS} is mostly "
        "noise; raise data.eval_fraction or give more data"
    ]
