"""Ctrl-C, SIGTERM and SIGHUP of the runner, which passes them on to the running trials."""

import os
import time
import types

from moejax.train.signals import MERGE_WITHIN, StopSignals

BETWEEN = 2 * MERGE_WITHIN
"""Least seconds between two signals that are passed on: trials merge those that come together."""


class Signals:
    """``with Signals() as signals``: while entered, signals are counted, not acted upon."""

    def __init__(self) -> None:
        self.asked = 0
        """The number of requests to stop, by the user or a cluster."""
        self._passed, self._last_passed = 0, -BETWEEN
        self._signals = StopSignals(self._handle)

    def __enter__(self) -> "Signals":
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__()

    def to_pass_on(self) -> bool:
        """True if the trials should be signalled now: once for each request."""
        now = time.monotonic()
        if self._passed == self.asked or now - self._last_passed < BETWEEN:
            return False
        self._passed, self._last_passed = self._passed + 1, now
        return True

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if not self._signals.is_request(number):
            return
        self.asked += 1
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"moejax: stopping the trials, which save; once more to abort them at once\n")
