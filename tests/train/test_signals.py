"""Signals to one process: requests to stop, and signals that end it."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.train.signals import Stop, Stopped, stopping

ROOT = Path(__file__).parents[2]
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Whatever a test does, the handlers are those that were there.

    SIGHUP has its usual one, although the tests themselves may run under nohup.
    """
    found = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {number: signal.getsignal(number) for number in ALL}
    yield
    assert {number: signal.getsignal(number) for number in ALL} == before
    signal.signal(signal.SIGHUP, found)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_after_begin_requests_a_stop(number: signal.Signals, capfd):
    with Stop() as stop:
        stop.begin()
        assert not stop.requested(0)
        signal.raise_signal(number)
        assert stop.requested(1)
    assert (
        "moejax: stopping after this step and saving; once more to abort" in capfd.readouterr().err
    )


@pytest.mark.parametrize("number", ALL)
def test_a_signal_before_begin_raises_stopped(number: signal.Signals):
    with Stop(), pytest.raises(Stopped, match=number.name):
        signal.raise_signal(number)
        raise AssertionError("goes on")


def test_a_service_managers_sigterm_and_sighup_are_one_request():
    with Stop() as stop:
        stop.begin()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested(1)


def test_under_nohup_a_run_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            stop.begin()
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_nested_stopping_is_the_same_stop():
    with stopping() as outer, stopping() as inner:
        assert inner is outer
    with stopping() as next_one:
        assert next_one is not outer


STUCK = """
import ctypes
from moejax.train.signals import Stop

lock = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
with Stop() as stop:
    stop.begin()
    libc.pthread_mutex_lock(lock)
    print("stuck", flush=True)
    libc.pthread_mutex_lock(lock)  # for ever, and outside Python
"""


def test_the_second_signal_ends_a_process_that_is_stuck_outside_python():
    """As in a collective with a process that has died, where no handler of Python's runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(signal.SIGINT)
        assert b"stopping after this step" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        # By the signal itself, where the main thread had not yet come to the lock; both are 130 to
        # a shell. In the lock only the thread can end it.
        assert process.wait(timeout=10) in (128 + signal.SIGINT, -signal.SIGINT)
    finally:
        process.kill()
        process.communicate()


LOSES_ITS_TERMINAL = """
import fcntl, os, sys, termios, time
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for fd in (0, 1, 2):
    os.dup2(terminal, fd)
from moejax.train.signals import Stop
with Stop() as stop:
    stop.begin()
    print("begun", flush=True)
    while not stop.requested(1):
        time.sleep(0.05)
    print("what is printed now goes nowhere", flush=True)
    with open(sys.argv[2], "w") as file:
        file.write("saved")
"""


def test_a_run_that_loses_its_terminal_still_saves(tmp_path: Path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LOSES_ITS_TERMINAL, os.ttyname(theirs), tmp_path / "done"], cwd=ROOT
    )
    try:
        said = b""
        until = time.monotonic() + 60
        while b"begun" not in said and time.monotonic() < until:
            said += os.read(ours, 1000)
        os.close(theirs)
        os.close(ours)  # the kernel sends SIGHUP
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "done").read_text() == "saved"
