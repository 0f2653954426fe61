"""The probe as the statistics take it: its valid tokens in a row, padding left out."""

import dataclasses
from collections.abc import Callable

import numpy as np

from moejax.analysis.statistics.selection import first_choice, selected
from moejax.record.probe import Probe


@dataclasses.dataclass(frozen=True)
class Routed:
    """What T tokens chose in M layers after ``step`` updates, whether or not there was room."""

    step: int
    selected_MTE: np.ndarray
    first_MT: np.ndarray
    """The expert of largest weight; -1 for a token without any."""

    @property
    def layers(self) -> range:
        return range(self.selected_MTE.shape[0])

    @property
    def experts(self) -> int:
        return self.selected_MTE.shape[2]


def routed(probe: Probe, step: int) -> Routed:
    """What was chosen at a recorded step."""
    found, valid_NL = probe.at(step), probe.tokens["valid"]
    num_experts = int(found["num_experts"])
    expert_MTK, weight_MTK = found["expert"][:, valid_NL], found["weight"][:, valid_NL]
    layers = list(zip(expert_MTK, weight_MTK, strict=True))
    return Routed(
        step,
        np.stack([selected(expert, weight, num_experts) for expert, weight in layers]),
        np.stack([first_choice(expert, weight) for expert, weight in layers]),
    )


def of_tokens(probe: Probe, name: str) -> np.ndarray:
    """An array [N, L] of tokens.npz as [T]."""
    return probe.tokens[name][probe.tokens["valid"]]


def at_tokens(probe: Probe, step: int, name: str) -> np.ndarray:
    """An array [M, N, L] of a recorded step as [M, T]."""
    return probe.at(step)[name][:, probe.tokens["valid"]]


def over_steps(probe: Probe, value: Callable[[int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All recorded steps [S] and ``value(step)`` at each, [S, ...]."""
    return np.asarray(probe.steps), np.stack([value(step) for step in probe.steps])
