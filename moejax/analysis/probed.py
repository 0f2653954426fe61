"""Arrays of the probe at its valid tokens, in a row and without padding."""

from collections.abc import Callable

import numpy as np

from moejax.record.probe import Probe


def of_tokens(probe: Probe, name: str) -> np.ndarray:
    """An array [N, L] of tokens.npz as [T]."""
    return probe.tokens[name][probe.tokens["valid"]]


def at_tokens(probe: Probe, step: int, name: str) -> np.ndarray:
    """An array [M, N, L] of a recorded step as [M, T]."""
    return probe.at(step)[name][:, probe.tokens["valid"]]


def over_steps(probe: Probe, value: Callable[[int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All recorded steps [S] and ``value(step)`` at each, [S, ...]."""
    return np.asarray(probe.steps), np.stack([value(step) for step in probe.steps])
