"""The contract between data and the training loop."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
"""Arrays that lead with rows. Every batch has ``valid`` (bool[B] or bool[B, L]) and ``row``
(int32[B], global ids); a source and its task agree on the rest."""


class Source(Protocol):
    """Training and held-out rows, the same at every call.

    Attributes:
      name: the file, the folder, or e.g. "python-3.11.7-stdlib".
      fingerprint: SHA-256 over all training and held-out data; equal means the same data.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def size(self) -> tuple[int | None, int]:
        """Number of training and of held-out items: tokens of text, images, examples. None: it is
        not known, as of a stream."""
        ...

    def shapes(self, rows: int) -> Batch:
        """A batch of ``rows`` rows of zeros: the element types and shapes of every batch."""
        ...

    def train_batch(self, step: int) -> Batch:
        """The batch of one step: a pure function of the step."""
        ...

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        """At most ``rows`` held-out rows, evenly spread, the same at every call. The last batch is
        padded with rows that are not ``valid``. ``row`` counts the rows of this list."""
        ...

    def baselines(self) -> dict[str, float]:
        """Losses to compare with, by name, on the rows of an evaluation; the first call may take a
        second."""
        ...

    def about(self) -> dict[str, Any]:
        """Further facts about the data for config.json."""
        ...

    def eval_extras(self, loss: float) -> dict[str, float]:
        """Metrics of an evaluation that follow from its loss, such as bits per byte."""
        ...

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Occurrences of each token id in training, int64[V], for gates that hash tokens."""
        ...

    def tokens(self, batch: Batch) -> np.ndarray:
        """Token ids of a batch for gates and recordings, int32[B, L]."""
        ...

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """Arrays of the probe's ``tokens.npz`` for rows of ``eval_batches(_, eval_rows)``, which
        ``row`` identifies: see ``moejax.record.probe.TOKENS``."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A source that depends on more than its data, such as a file about certain rows."""

    def check_rows(self, train_steps: int) -> None:
        """Raises UserError unless it can give the batches of these steps and of an evaluation."""
        ...


@runtime_checkable
class Positioned(Protocol):
    """A source that finds a step's rows faster with a note about them from an earlier process.

    The rows are the same with and without it.
    """

    def position(self, step: int) -> Any:
        """The note, which goes with the checkpoint of the step; as for JSON."""
        ...

    def resume(self, position: Any) -> None:
        """Take a note of the same data; anything else makes no difference."""
        ...


@runtime_checkable
class Remarks(Protocol):
    """A source with remarks at the start of a run; computing them may take seconds."""

    def facts(self) -> dict[str, str]:
        """Lines, each under its heading."""
        ...

    def warnings(self) -> list[str]:
        """Likely mistakes, one line each."""
        ...


@runtime_checkable
class Mixed(Protocol):
    """A source made of several, of which rows have the losses apart."""

    def extras_apart(self, row: dict[str, Any]) -> dict[str, float]:
        """Metrics of an evaluation that follow from its losses ``loss/NAME``, such as
        ``bits_per_byte/NAME``."""
        ...


FEW_ROWS = 100
"""Held-out examples below which a run warns: the standard error of a share is up to 5 % there."""


def few_rows(rows: int, item: str) -> list[str]:
    """The warning about a small held-out side; empty if it is large enough."""
    if rows >= FEW_ROWS:
        return []
    return [
        f"only {rows} {item}s are held out, and a held-out loss of fewer than {FEW_ROWS} is mostly "
        "noise; raise data.eval_fraction or give more data"
    ]
