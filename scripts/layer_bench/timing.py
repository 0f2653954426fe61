"""Interleaved timing: every candidate between two runs of what it is compared with."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

Run = Callable[[], object]

SLOW, FEW = 3.0, 3
"""Rounds of a candidate that takes more than 3 seconds, at most."""


class Timing(NamedTuple):
    """Median and quartiles of the ratios of paired runs, and the median time in milliseconds."""

    ratio: float
    low: float
    high: float
    ms: float


def seconds(run: Run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def paired(base: Run, candidates: dict[str, Run], rounds: int) -> tuple[dict[str, Timing], float]:
    """Timings of every candidate over ``base``, and the median time of ``base`` in milliseconds.

    In each round every candidate runs between two runs of ``base`` and is divided by their mean, so
    that a slow spell of the machine falls on both.
    """
    for run in (base, *candidates.values()):
        seconds(run)
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    base_times = [seconds(base)]
    for _ in range(rounds):
        for name, run in candidates.items():
            if len(times[name]) >= FEW and min(times[name]) > SLOW:
                continue
            times[name].append(seconds(run))
            base_times.append(seconds(base))
            ratios[name].append(2 * times[name][-1] / (base_times[-2] + base_times[-1]))
    found = {}
    for name in candidates:
        low, middle, high = (float(q) for q in np.quantile(ratios[name], (0.25, 0.5, 0.75)))
        found[name] = Timing(middle, low, high, float(np.median(times[name])) * 1e3)
    return found, float(np.median(base_times)) * 1e3


def over_fastest(found: dict[str, Timing], other_base: str) -> dict[str, Timing]:
    """The same ratios, over ``other_base`` where that was faster than the base."""
    by = min(1.0, found[other_base].ratio)
    return {n: Timing(t.ratio / by, t.low / by, t.high / by, t.ms) for n, t in found.items()}
