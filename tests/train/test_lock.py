"""One writer per workdir, in real processes."""

import multiprocessing
import os
import signal
import socket

import pytest

from moejax.errors import UserError
from moejax.train.workdir.lock import WorkdirLock


def hold(workdir, ready):
    with WorkdirLock(workdir):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process, in its own interpreter, that holds the lock of `tmp_path`/run."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_second_writer_learns_the_owner_and_a_killed_owner_frees_the_lock(holder, tmp_path):
    said = rf"run is in use by process {holder.pid} on {socket.gethostname()} since 20\d\d-.*T"
    for _ in range(2):  # a refused attempt does not disturb the holder
        with pytest.raises(UserError, match=said), WorkdirLock(tmp_path / "run"):
            raise AssertionError("two writers at once")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with WorkdirLock(tmp_path / "run"):
        pass


def test_the_lock_is_free_again_after_the_block_even_if_it_raised(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), WorkdirLock(tmp_path):
            with pytest.raises(UserError, match=f"process {os.getpid()} "), WorkdirLock(tmp_path):
                raise AssertionError("two writers at once")
            raise KeyError


def test_an_unreadable_lock_file_still_locks(tmp_path):
    with WorkdirLock(tmp_path):
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(UserError, match="another process"), WorkdirLock(tmp_path):
            raise AssertionError("two writers at once")
