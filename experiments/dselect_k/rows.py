"""Rows of results: numbers of every seed with intervals, compared, and printed as a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.dselect_k.metrics import mean_interval, share_interval

Row = dict[str, Any]
"""Labels; ``seeds``: every seed's value of each measure; and by measure [value, low, high]."""

SHARES = {"exact"}
"""Measures that are 0 or 1 for a seed."""

LABELS = {"gate", "start", "gamma", "lambda", "lr", "E", "penalty", "tasks", "points"}


def row(labels: dict[str, Any], seeds: dict[str, Sequence[float]]) -> Row:
    intervals = {
        name: list((share_interval if name in SHARES else mean_interval)(np.asarray(values)))
        for name, values in seeds.items()
    }
    return {**labels, **intervals, "seeds": {name: list(values) for name, values in seeds.items()}}


def ratio(above: Row, below: Row, name: str) -> list[float]:
    """Geometric mean over seeds of the ratio of a measure, and its 95 % interval.

    Pairs of equal seeds: the same data in the same order.
    """
    log_R = np.log(above["seeds"][name]) - np.log(below["seeds"][name])
    return [float(np.exp(end)) for end in mean_interval(log_R)]


def tuned(rows: list[Row], by: str = "test_mse") -> list[Row]:
    """Each gate's best setting on even seeds, evaluated on the odd ones.

    On the seeds that selected it, the best of many settings looks better than it is.
    """
    chosen = []
    for gate in dict.fromkeys(row["gate"] for row in rows):
        candidates = [row for row in rows if row["gate"] == gate]
        best = min(candidates, key=lambda row: float(np.mean(row["seeds"][by][::2])))
        labels = {name: best[name] for name in LABELS if name in best}
        chosen.append(row(labels, {name: values[1::2] for name, values in best["seeds"].items()}))
    return chosen


def head(columns: Sequence[str]) -> str:
    """Header of a Markdown table."""
    return f"{_line(columns)}\n{_line(['---'] * len(columns))}"


def line(row: Row, columns: Sequence[str]) -> str:
    """Its cells: labels, and measures with their 95 % intervals."""
    return _line([_cell(row.get(name), name in LABELS) for name in columns])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any, is_label: bool) -> str:
    if value is None:
        return ""
    if is_label:
        return value if isinstance(value, str) else f"{value:g}"
    middle, low, high = (f"{number:.3g}" for number in value)
    return middle if low == high else f"{middle} [{low}, {high}]"
