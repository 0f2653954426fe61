"""Tables for several tasks at once: rows of features and targets, and batches of them by step.

A row has numeric features ("dense"), categorical ones as ids, and one target per task, some of
which may be missing. Where tables come from: ``synthetic_tables.py``, ``recommender.py`` and
``table_files.py``.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.data.batches import Batch
from moejax.errors import UserError

Kind = Literal["regression", "binary"]
FARTHEST = 1e18
"""Spreads from the mean: float32 holds squares, and sums of them, up to 3e38."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One task. ``mean`` and ``scale`` are of a regression's training rows; 0 and 1 if binary.

    ``rate``: the mean of the training rows, for a binary task the share of ones.
    """

    name: str
    kind: Kind
    mean: float
    scale: float
    rate: float

    @property
    def guess(self) -> float:
        """What somebody says who always says the mean, as ``Rows`` have it."""
        return 0.0 if self.kind == "regression" else self.rate


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """N rows. A target that is missing is 0 and not ``present``.

    A table's targets are float32, those of regressions in standard deviations from the mean of the
    training rows; ``as_rows`` gives them in their own units, float64, for ``make_table``.
    """

    dense_NF: Float[np.ndarray, "N F"]
    category_NC: Int[np.ndarray, "N C"]
    target_NM: Float[np.ndarray, "N M"]
    present_NM: Bool[np.ndarray, "N M"]

    def __len__(self) -> int:
        return len(self.target_NM)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Training and held-out rows with what is needed to read them.

    Attributes:
      targets: the tasks, in the order of the columns of ``target_NM``.
      dense, category: names of the features; ``category_sizes``: ids of each lie below it. In
        tables from files id 0 stands for values that the training rows do not have, and
        ``category_values`` are those of the other ids, as text.
      encoding: SHA-256 of what ids and standardised numbers of a file's features stand for.
      name: where the rows came from.
      ideal_NM: of generated tables, what somebody who knows the generator would predict for the
        held-out rows: expected values, standardised as targets are, or probabilities of binary
        ones.
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
        """Targets as rows have them, in their own units."""
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
    """A table from ``as_rows``: describes every target by its training rows and standardises it.

    All in float64, of which float32 has too few digits for times or amounts with small changes.
    ``ideal_NM`` is in the targets' units. ``known``: the rest.

    Raises:
      UserError: a target that is missing or the same in all training rows, or held-out values so
        far from them that float32 cannot square them.
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

    Counted from the least value and in units of the range: large values that change little keep
    their digits, and small ones squares above 0.
    """
    least = values_N.min()
    span = values_N.max() - least
    share_N = (values_N - least) / span
    return float(least + span * share_N.mean()), float(span * share_N.std())


def as_rows(
    dense_NF: np.ndarray | None, category_NC: np.ndarray | None, target_NM: np.ndarray
) -> Rows:
    """Rows for ``make_table``: targets float64 in their own units; one that is NaN is missing."""
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
    """Where the held-out rows begin, with at least one row on either side."""
    check_fraction(eval_fraction)
    if rows < 2:
        raise UserError(
            f"task.rows: {rows} is too few to train on some and hold out others; use 2+"
        )
    return rows - heldout_count(rows, eval_fraction)


def check_fraction(eval_fraction: float) -> None:
    """Raises UserError unless it is a share."""
    if not 0.0 < eval_fraction < 1.0:
        raise UserError(
            f"data.eval_fraction: {eval_fraction} is not between 0 and 1 (both excluded)"
        )


def heldout_count(rows: int, eval_fraction: float) -> int:
    """How many of the rows are held out."""
    return min(max(round(eval_fraction * rows), 1), rows - 1)


class TableBatches:
    """Shuffled batches of rows, for any step, in any order.

    Batch b is rows b*B .. (b+1)*B of the epochs laid end to end, each a seeded permutation.

    Args:
      rows: the training rows.
      batch_size: rows per global batch (B).
      seed: the permutations' seed, in [0, 2**32).
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int):
        import grain  # slow to import

        if batch_size < 1:
            raise UserError(f"train.batch_size: {batch_size} must be at least 1")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"train.seed: {seed} is not in [0, 2**32)")
        if not len(rows):
            raise UserError("data.path: there are no training rows; lower data.eval_fraction")
        self.num_rows, self._rows, self._batch_size = len(rows), rows, batch_size
        self._order: Any = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of one step, or some of its rows (a host's share).

        Returns `dense` float32 [B, F], `category` int32 [B, C], `target` float32 [B, M], `present`
        bool [B, M], `valid` bool [B] (all true) and `row` int32 [B], the global row id `step*B + i`
        modulo 2**31.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        shares = range(self._batch_size)[rows if rows is not None else slice(None)]
        positions = [step * self._batch_size + i for i in shares]
        chosen = np.array([int(self._order[position]) for position in positions], dtype=np.int64)
        ids = np.array([position % (1 << 31) for position in positions], dtype=np.int32)
        return _batch(take(self._rows, chosen), ids, np.ones(len(positions), dtype=bool))


def table_eval_batches(rows: Rows, batch_size: int, count: int) -> list[Batch]:
    """Batches of `count` rows spread evenly over the held-out ones, the same at every call.

    Fewer if there are fewer. The last batch is filled up with rows of zeros that are `valid=False`.
    Keys as in `TableBatches.batch`; `row` counts the rows of this list.
    """
    chosen = eval_rows(len(rows), count)
    batches = []
    for begin in range(0, len(chosen), batch_size):
        some = take(rows, chosen[begin : begin + batch_size])
        missing = batch_size - len(some)
        arrays = [getattr(some, field.name) for field in dataclasses.fields(some)]
        full = Rows(*(np.pad(a, ((0, missing), (0, 0))) for a in arrays))
        ids = np.arange(begin, begin + batch_size, dtype=np.int32)
        batches.append(_batch(full, ids, np.arange(batch_size) < len(some)))
    return batches


def eval_rows(available: int, count: int) -> np.ndarray:
    """Which held-out rows `table_eval_batches` takes."""
    if count < 1:
        raise UserError(f"train.eval_rows: {count} must be at least 1")
    if not available:
        raise UserError("data.eval_fraction: there are no held-out rows; raise it")
    count = min(count, available)
    return np.array([j * available // count for j in range(count)], dtype=np.int64)


def _batch(rows: Rows, ids: np.ndarray, valid: np.ndarray) -> Batch:
    return {
        "dense": rows.dense_NF,
        "category": rows.category_NC,
        "target": rows.target_NM,
        "present": rows.present_NM,
        "valid": valid,
        "row": ids,
    }
