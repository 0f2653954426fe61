"""Ctrl-C, SIGTERM and SIGHUP of the runner, which passes them on to the trials that run."""

import os
import signal
import time
import types
from typing import Any

from moejax.train.signals import heeded, let_go_of, terminals

TOGETHER = 1.0
"""Seconds within which SIGTERMs are one request: `timeout` signals its child and then its group."""
BETWEEN = 2 * TOGETHER
"""Seconds between two that are passed on: a trial too takes those that come together for one."""


class Signals:
    """``with Signals() as signals``: while entered, signals are counted, not acted upon."""

    def __init__(self) -> None:
        self.asked = 0
        """How often the user, or a cluster, asked to stop."""
        self._passed, self._last_passed = 0, -BETWEEN
        self._last_term = -TOGETHER
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._terminal = terminals()
        for number in heeded():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def to_pass_on(self) -> bool:
        """Whether the trials are to get a signal now; true once for each request."""
        now = time.monotonic()
        if self._passed == self.asked or now - self._last_passed < BETWEEN:
            return False
        self._passed, self._last_passed = self._passed + 1, now
        return True

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            let_go_of(self._terminal)
        if number != signal.SIGINT:
            if now - self._last_term < TOGETHER:
                return
            self._last_term = now
        self.asked += 1
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"moejax: stopping the trials, which save; once more to abort them at once\n")
