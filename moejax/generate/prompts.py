"""Prompts as arrays: padded in front to one of few lengths."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

LEAST = 16
"""The shortest length that prompts are padded to."""


class Prompts(NamedTuple):
    """Prompts of one batch; ``valid_BP`` is False for the padding in front of each."""

    token_BP: Int[np.ndarray, "B P"]
    valid_BP: Bool[np.ndarray, "B P"]

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], batch: int) -> "Prompts":
        """The prompts in a batch of ``batch`` rows; rows without a prompt are padding."""
        length = bucket(max(map(len, prompts)))
        token_BP = np.zeros((batch, length), np.int32)
        valid_BP = np.zeros((batch, length), bool)
        for row, prompt in enumerate(prompts):
            token_BP[row, length - len(prompt) :] = prompt
            valid_BP[row, length - len(prompt) :] = True
        return cls(token_BP, valid_BP)


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is no less than ``length``.

    A program is compiled for each of them that occurs. Beyond 16, less than a third is padding.
    """
    return next(size for size in _buckets() if size >= length)


def _buckets() -> Iterator[int]:
    for power in itertools.count():
        yield LEAST << power
        yield 3 * (LEAST << power) // 2


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The prompts' numbers in batches of at most ``size``, those of similar length together."""
    order = sorted(range(len(lengths)), key=lambda number: (bucket(lengths[number]), number))
    return [order[i : i + size] for i in range(0, len(order), size)]
