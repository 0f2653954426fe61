"""Tables for several tasks at once: training and held-out rows of features and targets.

A row has numeric features ("dense"), categorical ones as ids, and one target per task, some of
which may be missing. ``generated.py`` and ``files.py`` make tables.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.data.source import Batch
from moejax.data.split import check_fraction
from moejax.errors import UserError

Kind = Literal["regression", "binary"]
FARTHEST = 1e18
"""Largest distance from the mean, in standard deviations: float32 holds squares, and sums of them,
up to 3e38."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One task. ``mean`` and ``scale``: mean and standard deviation of a regression's training
    rows; 0 and 1 for a binary task.

    ``rate``: the mean of the training rows, for a binary task the share of ones.
    """

    name: str
    kind: Kind
    mean: float
    scale: float
    rate: float

    @property
    def guess(self) -> float:
        """The constant prediction of the mean, in the units of ``Rows``."""
        return 0.0 if self.kind == "regression" else self.rate


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """N rows. A missing target is 0 and not ``present``.

    The targets of a table are float32, those of regressions in standard deviations from the mean of
    the training rows; ``as_rows`` gives them in their own units, float64, for ``make_table``.
    """

    dense_NF: Float[np.ndarray, "N F"]
    category_NC: Int[np.ndarray, "N C"]
    target_NM: Float[np.ndarray, "N M"]
    present_NM: Bool[np.ndarray, "N M"]

    def __len__(self) -> int:
        return len(self.target_NM)

    def read(self, row_B: np.ndarray, position_B: np.ndarray) -> Batch:
        """``dense`` float32 [B, F], ``category`` int32 [B, C], ``target`` float32 [B, M],
        ``present`` bool [B, M] and ``valid`` bool [B], all true."""
        return {
            "dense": self.dense_NF[row_B],
            "category": self.category_NC[row_B],
            "target": self.target_NM[row_B],
            "present": self.present_NM[row_B],
            "valid": np.ones(len(row_B), dtype=bool),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Training and held-out rows and the meaning of their columns.

    Attributes:
      targets: the tasks, in the order of the columns of ``target_NM``.
      dense, category: names of the features.
      category_sizes: number of ids of each categorical feature. In tables from files id 0 stands
        for values that do not occur in the training rows.
      category_values: the values of the other ids, as text; empty for generated tables.
      encoding: SHA-256 of the meaning of ids and standardised numbers of a file's features.
      name: origin of the rows.
      ideal_NM: predictions for the held-out rows from full knowledge of the generator, for
        generated tables: expected values, standardised as targets are, or probabilities.
    """

    train: Rows
    heldout: Rows
    targets: tuple[Target, ...]
    dense: tuple[str, ...]
    category: tuple[str, ...]
    category_sizes: tuple[int, ...]
    name: str
    ideal_NM: Float[np.ndarray, "N M"] | None = None
    category_values: tuple[tuple[str, ...], ...] = ()
    encoding: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and rows; equal means the same data."""
        digest = hashlib.sha256(
            repr((self.targets, self.dense, self.category, self.category_sizes)).encode()
        )
        for rows in (self.train, self.heldout):
            for field in dataclasses.fields(rows):
                array = np.ascontiguousarray(getattr(rows, field.name))
                digest.update(repr((array.shape, array.dtype.str)).encode() + array.tobytes())
        return digest.hexdigest()

    def in_units(self, target_NM: Float[np.ndarray, "N M"]) -> Float[np.ndarray, "N M"]:
        """Targets of ``Rows`` in their own units."""
        mean_M = np.array([target.mean for target in self.targets])
        return target_NM * np.array([target.scale for target in self.targets]) + mean_M


def make_table(
    train: Rows,
    heldout: Rows,
    names: Sequence[str],
    kinds: Sequence[Kind],
    ideal_NM: Float[np.ndarray, "N M"] | None = None,
    **known: Any,
) -> Table:
    """Make a table from ``as_rows``: describe every target by its training rows, standardise it.

    Computed in float64: float32 has too few digits for times, or for amounts with small changes.
    ``ideal_NM`` is in the targets' units. ``known``: the other fields of ``Table``.

    Raises:
      UserError: a target that is missing or constant in all training rows, or held-out values too
        far from them for float32 to hold their squares.
    """
    targets = []
    for m, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        values = train.target_NM[train.present_NM[:, m], m]
        if not len(values):
            raise UserError(
                f"task.targets: {name!r} is missing in every training row; leave it out"
            )
        if values.min() == values.max():
            raise UserError(
                f"task.targets: {name!r} is {values[0]:.12g} in every training row, so there is "
                "nothing to learn; leave it out"
            )
        mean, scale = mean_and_spread(values)
        own = (mean, scale) if kind == "regression" else (0.0, 1.0)
        targets.append(Target(name, kind, *own, rate=mean))
    mean_M = np.array([target.mean for target in targets])
    scale_M = np.array([target.scale for target in targets])

    def standardised(rows: Rows) -> Rows:
        scaled_NM = np.where(rows.present_NM, (rows.target_NM - mean_M) / scale_M, 0.0)
        for m in np.flatnonzero((np.abs(scaled_NM) > FARTHEST).any(axis=0)):
            raise UserError(
                f"task.targets: {targets[m].name!r} has a held-out value "
                f"{np.abs(scaled_NM[:, m]).max():.2g} times the spread of the training rows away "
                "from their mean; correct it or leave it empty"
            )
        return dataclasses.replace(rows, target_NM=scaled_NM.astype(np.float32))

    if ideal_NM is not None:
        ideal_NM = (ideal_NM - mean_M) / scale_M
    sides = (standardised(train), standardised(heldout))
    return Table(*sides, tuple(targets), ideal_NM=ideal_NM, **known)


def mean_and_spread(values_N: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Mean and standard deviation of values that are not all the same.

    Computed relative to the smallest value and in units of the range, so that large values with
    small changes keep their digits and squares of small ones do not underflow.
    """
    smallest = values_N.min()
    span = values_N.max() - smallest
    share_N = (values_N - smallest) / span
    return float(smallest + span * share_N.mean()), float(span * share_N.std())


def as_rows(
    dense_NF: np.ndarray | None, category_NC: np.ndarray | None, target_NM: np.ndarray
) -> Rows:
    """Rows for ``make_table``: targets float64 in their own units; a NaN is a missing target."""
    count, present_NM = len(target_NM), ~np.isnan(target_NM)
    dense = np.zeros((count, 0)) if dense_NF is None else dense_NF
    category = np.zeros((count, 0)) if category_NC is None else category_NC
    return Rows(
        dense.astype(np.float32),
        category.astype(np.int32),
        np.where(present_NM, target_NM, 0.0).astype(np.float64),
        present_NM,
    )


def take(rows: Rows, index: np.ndarray | slice) -> Rows:
    """Some of the rows."""
    return Rows(*(getattr(rows, field.name)[index] for field in dataclasses.fields(rows)))


def first_heldout(rows: int, eval_fraction: float) -> int:
    """The first held-out row, with at least one row on either side."""
    check_fraction(eval_fraction)
    if rows < 2:
        raise UserError(
            f"task.rows: {rows} is too few to train on some and hold out others; use 2+"
        )
    return rows - heldout_count(rows, eval_fraction)


def heldout_count(rows: int, eval_fraction: float) -> int:
    """Number of held-out rows."""
    return min(max(round(eval_fraction * rows), 1), rows - 1)
