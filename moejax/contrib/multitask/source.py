"""Tables in the form that the training loop asks for: rows are examples."""

import dataclasses
import functools
from typing import Any

import numpy as np

from moejax.contrib.multitask.baselines import table_baselines
from moejax.contrib.multitask.tables import Table
from moejax.data.batches import TrainBatches, heldout_batches
from moejax.data.source import Batch, few_rows

MOST_VALUES = 256
"""Most values of the categorical column that names examples in a report."""
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


@dataclasses.dataclass(frozen=True, eq=False)
class TableSource:
    """Rows of a table. A batch: ``dense`` float32[B, F], ``category`` int32[B, C], ``target``
    float32[B, M], ``present`` bool[B, M], ``valid`` bool[B], ``row`` int32[B]."""

    table: Table
    batch_size: int
    seed: int
    eval_rows: int
    """Most rows of an evaluation. The baselines are computed on the same rows."""

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def fingerprint(self) -> str:
        return self.table.fingerprint

    @functools.cached_property
    def train(self) -> TrainBatches:
        rows = self.table.train
        return TrainBatches(len(rows), self.batch_size, self.seed, rows.read)

    def size(self) -> tuple[int, int]:
        return len(self.table.train), len(self.table.heldout)

    def shapes(self, rows: int) -> Batch:
        features, table = self.table.train, self.table
        return {
            "dense": np.zeros((rows, features.dense_NF.shape[1]), np.float32),
            "category": np.zeros((rows, features.category_NC.shape[1]), np.int32),
            "target": np.zeros((rows, len(table.targets)), np.float32),
            "present": np.zeros((rows, len(table.targets)), np.bool_),
            "valid": np.zeros(rows, np.bool_),
            "row": np.zeros(rows, np.int32),
        }

    def train_batch(self, step: int) -> Batch:
        return self.train.batch(step)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        heldout = self.table.heldout
        return heldout_batches(len(heldout), batch_size, rows, heldout.read)

    def baselines(self) -> dict[str, float]:
        return self._baselines

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        return table_baselines(self.table, self.eval_rows)

    def about(self) -> dict[str, Any]:
        """The tasks, the number of values of each feature (0: numeric), and for a file the digest
        of their meaning."""
        table = self.table
        features = dict.fromkeys(table.dense, 0)
        return {
            "targets": [dataclasses.asdict(target) for target in table.targets],
            "features": features | dict(zip(table.category, table.category_sizes, strict=True)),
            **({"encoding": table.encoding} if table.encoding else {}),
        }

    def facts(self) -> dict[str, str]:
        return {}

    def warnings(self) -> list[str]:
        """A small held-out side, and features that are constant in the training rows."""
        table = self.table
        lines = few_rows(len(table.heldout), "example")
        varies_F = np.abs(table.train.dense_NF).max(axis=0) > 0  # their mean is 0
        for name, varies in zip(table.dense, varies_F, strict=True):
            if not varies:
                lines.append(
                    f"task.numeric: {name!r} is the same in all training rows, or differs by less "
                    "than float64 resolves; leave it out, or subtract a constant"
                )
        for name, size in zip(table.category, table.category_sizes, strict=True):
            if size == 1:
                lines.append(
                    f"task.categorical: {name!r} has no value that task.min_count training rows "
                    "share, so that all rows are 'unknown'; leave it out or lower task.min_count"
                )
        return lines

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Examples have no tokens; gates that need them are refused."""
        return np.zeros(vocab_size, np.int64)

    def tokens(self, batch: Batch) -> np.ndarray:
        """An example is named by its value in the column with the most values, up to 256."""
        column = self._name_column
        if column is None:
            return np.zeros((len(batch["row"]), 1), np.int32)
        return batch["category"][:, column : column + 1]

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """The target and the label of an example are those of the first task: its quarter among the
        training rows, or 0 or 1 for a binary task."""
        token_N1, names = self.tokens(batch), ["example"]
        if self._name_column is not None:
            names = self._values(self._name_column)
        label_N, labels = self._labels(batch)
        return {
            "token": token_N1,
            "target": (label_N[:, None] + len(names)).astype(np.int32),
            "valid": batch["valid"][:, None],
            "row": batch["row"],
            "token_text": [*names, *labels],
            "label": label_N[:, None].astype(np.uint8),
            "label_names": labels,
        }

    def _values(self, column: int) -> list[str]:
        """The value of each id of a categorical column; for generated tables the id itself."""
        name, values = self.table.category[column], self.table.category_values
        if not values:
            return [f"{name} {i}" for i in range(self.table.category_sizes[column])]
        return [f"{name} unknown", *(f"{name} {value}" for value in values[column])]

    @property
    def _name_column(self) -> int | None:
        sizes = self.table.category_sizes
        fitting = [c for c, size in enumerate(sizes) if size <= MOST_VALUES]
        return max(fitting, key=lambda c: sizes[c]) if fitting else None

    def _labels(self, batch: Batch) -> tuple[np.ndarray, list[str]]:
        first, train = self.table.targets[0], self.table.train
        value_N, present_N = batch["target"][:, 0], batch["present"][:, 0]
        if first.kind == "binary":
            names, label_N = [f"not {first.name}", first.name], value_N > 0.5
        else:
            edges = np.quantile(train.target_NM[train.present_NM[:, 0], 0], (0.25, 0.5, 0.75))
            names = [f"{first.name}: {quarter}" for quarter in QUARTERS]
            label_N = np.searchsorted(edges, value_N)
        return np.where(present_N, label_N, len(names)).astype(np.int64), [
            *names,
            f"{first.name} missing",
        ]
