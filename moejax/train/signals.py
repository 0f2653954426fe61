"""Ctrl-C, SIGTERM and SIGHUP: finish the step, save, exit."""

import os
import select
import signal
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from moejax import job as jobs
from moejax.job.member import say

MERGE_WITHIN = 1.0
"""Seconds within which SIGTERMs and SIGHUPs are one request: a cluster stops every process of a
job, `moejax sweep` and `timeout` forward their signals, a service manager sends both signals."""

GRACE = 0.3
"""Seconds that the main thread has to end the process by the second signal itself."""

Handler = Callable[[int, types.FrameType | None], None]


class StopSignals:
    """Handles the signals that ask a process to stop, while it is entered."""

    def __init__(self, handle: Handler):
        self._handle = handle
        self._terminal: list[int] = []
        self._previous: dict[int, Any] = {}
        self._last_term = -MERGE_WITHIN

    def __enter__(self) -> "StopSignals":
        self._terminal = [fd for fd in (0, 1, 2) if os.isatty(fd)]
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it is ignored
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __contains__(self, number: int) -> bool:
        return number in self._previous

    def is_request(self, number: int) -> bool:
        """True if a signal is a new request to stop, and not a repetition of the one before.

        After a SIGHUP the terminal is gone, and prints go nowhere instead of failing.
        """
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in self._terminal:
                os.dup2(nowhere, fd)
            os.close(nowhere)
        if number == signal.SIGINT:
            return True
        now = time.monotonic()
        if now - self._last_term < MERGE_WITHIN:
            return False
        self._last_term = now
        return True


_active: "Stop | None" = None


class Stopped(BaseException):
    """A signal came before there was anything to save; raised wherever the process is then."""


class Stop:
    """``with Stop() as stop: ... if stop.requested(step): save``. A second signal aborts at once.

    Before ``begin`` there is nothing to save, and the first signal raises `Stopped`. In a job of
    several processes a signal to any of them stops all, at a step that they agree on.

    Python handles signals in the main thread, between two of its instructions. The main thread may
    be busy for minutes in a compilation, or for ever in a computation with a process that has died.
    So a second thread gets the signals too; it passes the first on and ends the process at the
    second.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._begun = self._raised = self._passed_on = False
        self._request: signal.Signals | None = None
        self._abort: signal.Signals | None = None
        self._signals = StopSignals(self._handle)
        self._lock = threading.RLock()  # the handler interrupts the main thread anywhere

    def __enter__(self) -> "Stop":
        global _active
        self._entered += 1
        if self._entered > 1:
            return self
        _active = self
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._signals.__enter__()
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="moejax signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._entered -= 1
        if self._entered:
            return
        _active = None
        self._signals.__exit__()
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, b"\0")
        self._thread.join()
        for end in (self._read, self._write):
            os.close(end)

    def begin(self) -> None:
        """Makes signals stop the run at the end of a step from now on."""
        self._begun = True
        self._wake()  # for a signal that came just before

    def requested(self, step: int) -> bool:
        """True if the run must stop after ``step`` updates; the same answer on every process."""
        job = jobs.current()
        return job.stops_at(step) if job else self._request is not None

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        self._drain()
        self._wake()
        if self._abort and jobs.current() is None:
            signal.signal(self._abort, signal.SIG_DFL)
            signal.raise_signal(self._abort)
        if self._request and not self._begun and not self._raised:
            self._raised = True
            raise Stopped(self._request.name)

    def _wake(self) -> None:
        """Wakes the second thread, since the main thread may have read the signal first."""
        os.write(self._write, b"\xff")

    def _listen(self) -> None:
        going = True
        while going:
            select.select([self._read], [], [])
            going = self._drain()
            job = jobs.current()
            if self._abort:
                _abort(self._abort, job)
            if job and self._request and self._begun and not self._passed_on:
                self._passed_on = True
                job.ask_to_stop(self._request.name)

    def _drain(self) -> bool:
        """Reads the signals that have arrived; False once the thread is to end."""
        with self._lock:
            try:
                numbers = os.read(self._read, 100)
            except BlockingIOError:  # the other thread was faster
                return True
            for number in numbers:
                if number in self._signals:
                    self._receive(signal.Signals(number))
            return 0 not in numbers

    def _receive(self, number: signal.Signals) -> None:
        if not self._signals.is_request(number):
            return
        if self._request:
            self._abort = number
            return
        self._request = number
        # Not print: the signal may have come in the middle of one.
        action = "stopping after this step and saving" if self._begun else "stopping"
        say(f"{action}; once more to abort at once")


def stopping() -> Stop:
    """The `Stop` that is already entered, to be entered once more, or a new one."""
    return _active or Stop()


def _abort(number: signal.Signals, job: jobs.Job | None) -> None:
    status = 128 + number  # as a shell reports it
    if job:
        job.fail(f"was aborted by a second signal, {number.name}", status)
        job.leave(status, patience=2)
    time.sleep(GRACE)
    os._exit(status)
