"""Ctrl-C, SIGTERM and SIGHUP: finish the step, save, leave."""

import os
import select
import signal
import threading
import time
import types
from typing import Any

from moejax import job as jobs
from moejax.job.client import say

TOGETHER = 1.0
"""Seconds within which SIGTERMs and SIGHUPs are one request: a cluster that stops every process of
a job, a parent that passes its own on as `moejax sweep` does, a service manager that sends both."""

PROMPT = 0.3
"""Seconds in which the main thread may end the process by the second signal itself."""


_active: "Stop | None" = None


class Stopped(BaseException):
    """A signal came before there was anything to save; raised wherever the process was then."""


class Stop:
    """``with Stop() as stop: ... if stop.requested(step): save``. A second signal aborts at once.

    Before ``begin`` there is nothing to save, and the first signal raises `Stopped`. In a job of
    several processes a signal to any of them stops all, at a step that they agree on.

    Python handles signals in the main thread, between two of its instructions. That may wait for
    minutes in a compilation, or for ever in a computation with a process that has died. So a thread
    hears of them too, which passes the first on and ends the process at the second.
    """

    def __init__(self) -> None:
        self._entered = 0
        self._begun = self._raised = self._passed_on = False
        self._asked: signal.Signals | None = None
        self._abort: signal.Signals | None = None
        self._last_term = -TOGETHER
        self._previous: dict[int, Any] = {}
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
        self._terminal = terminals()
        for number in heeded():
            self._previous[number] = signal.signal(number, self._handle)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="moejax signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._entered -= 1
        if self._entered:
            return
        _active = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, b"\0")
        self._thread.join()
        for end in (self._read, self._write):
            os.close(end)

    def begin(self) -> None:
        """From now on a signal stops the run at the end of a step."""
        self._begun = True
        self._wake()  # for a signal that came just before

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step`` updates; the same answer on every process."""
        job = jobs.current()
        return job.stops_at(step) if job else self._asked is not None

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        self._drain()
        self._wake()
        if self._abort and jobs.current() is None:
            signal.signal(self._abort, signal.SIG_DFL)
            signal.raise_signal(self._abort)
        if self._asked and not self._begun and not self._raised:
            self._raised = True
            raise Stopped(self._asked.name)

    def _wake(self) -> None:
        """Has the thread look at what the main thread may have taken from under its hands."""
        os.write(self._write, b"\xff")

    def _watch(self) -> None:
        going = True
        while going:
            select.select([self._read], [], [])
            going = self._drain()
            job = jobs.current()
            if self._abort:
                _abort(self._abort, job)
            if job and self._asked and self._begun and not self._passed_on:
                self._passed_on = True
                job.ask_to_stop(self._asked.name)

    def _drain(self) -> bool:
        """Takes what has arrived; False once no more will."""
        with self._lock:
            try:
                numbers = os.read(self._read, 100)
            except BlockingIOError:  # the other thread was faster
                return True
            for number in numbers:
                if number in self._previous:
                    self._take(signal.Signals(number))
            return 0 not in numbers

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number != signal.SIGINT:
            if now - self._last_term < TOGETHER:
                return
            self._last_term = now
        if number == signal.SIGHUP:
            let_go_of(self._terminal)
        if self._asked:
            self._abort = number
            return
        self._asked = number
        # Not print: the signal may have come in the middle of one.
        what = "stopping after this step and saving" if self._begun else "stopping"
        say(f"{what}; once more to abort at once")


def stopping() -> Stop:
    """The `Stop` that is entered already, to be entered once more, or a new one."""
    return _active or Stop()


def _abort(number: signal.Signals, job: jobs.Job | None) -> None:
    status = 128 + number  # a shell's word for it
    if job:
        job.fail(f"was aborted by a second signal, {number.name}", status)
        job.leave(status, patience=2)
    time.sleep(PROMPT)
    os._exit(status)


def heeded() -> list[signal.Signals]:
    """The signals that ask a process to stop; under nohup it outlives its terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def terminals() -> list[int]:
    """Those of stdin, stdout and stderr that are a terminal."""
    return [fd for fd in (0, 1, 2) if os.isatty(fd)]


def let_go_of(terminal: list[int]) -> None:
    """Has what is printed go nowhere: the terminal has gone, and a print would fail instead."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in terminal:
        os.dup2(nowhere, fd)
    os.close(nowhere)
