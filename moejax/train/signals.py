"""Ctrl-C, SIGTERM and preemption notices: finish the step, save, leave."""

import os
import signal
import time
import types
from typing import Any

import jax
from jax.experimental import multihost_utils

TOGETHER = 1.0
"""Seconds within which SIGTERMs are one request: a cluster that stops every process of a job, and a
parent that passes its own on, as `moejax sweep` does."""


class Stop:
    """``with Stop() as stop: ... if stop.requested(step): save``. A second signal aborts at once.

    In a job of several processes all of them agree on the step to stop at, through JAX's
    preemption sync point.
    """

    def __init__(self) -> None:
        self._asked = False
        self._last_term = -TOGETHER
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step`` updates; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM:
            if now - self._last_term < TOGETHER:
                return
            self._last_term = now
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"moejax: stopping after this step and saving; once more to abort at once\n")
