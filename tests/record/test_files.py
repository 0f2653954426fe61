"""A full disk is reported in one line wherever a file is written; existing files stay unchanged."""

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import cli
from moejax.errors import UserError
from moejax.record import files
from moejax.record import routing as recording
from moejax.sweep.folder import write_whole
from moejax.train.metrics.log import MetricsLog
from moejax.train.metrics.mirrors import TensorBoard
from moejax.train.workdir.lock import WorkdirLock
from tests import probes


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, the system refuses to make any file larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_probe(path: Path) -> None:
    tokens = probes.tokens()
    probes.save_step(path, 0, probes.step(0, tokens["valid"]))


def write_recording(path: Path) -> None:
    shape = (2, 40, 16, 2)
    arrays = {
        "expert": np.zeros(shape, np.int32),
        "weight": np.random.default_rng(0).random(shape, np.float32),
        "kept": np.ones(shape, bool),
        "identity": np.zeros(shape[:3], np.float32),
        "token": np.zeros(shape[1:3], np.int32),
        "digest": np.zeros(40, np.uint64),
    }
    routed = recording.from_arrays(arrays, 4)
    recording.save(path / "r.npz", recording.Recording(routed, routed, {"num_experts": 4}))


def write_events(path: Path) -> None:
    events = TensorBoard(path / "tensorboard", resume_step=3)
    with contextlib.closing(events):
        for step in range(1000):  # more than any queue holds
            events.add(step, {"loss": 1.0})


def write_metrics(path: Path) -> None:
    with MetricsLog(path, None) as log:
        for step in range(100):
            log.write({"step": step, "split": "train", "loss": 0.25})


WRITERS: dict[str, Callable[[Path], Any]] = {
    "probe/step-00000000.npz": write_probe,
    "r.npz": write_recording,
    "tensorboard": write_events,
    "metrics.jsonl": write_metrics,
    "sweep.json": lambda path: write_whole(path / "sweep.json", "x" * 5000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_reported_in_one_line_with_the_file(name: str, tmp_path: Path):
    with pytest.raises(UserError) as caught, largest_file(1000):
        WRITERS[name](tmp_path)
    assert name in str(caught.value) and "cannot be written: " in str(caught.value)
    assert "\n" not in str(caught.value)
    left = [path.name for path in tmp_path.rglob("*.tmp")]
    assert not left
    WRITERS[name](tmp_path / "with room")


@pytest.mark.parametrize("target", ["/dev/full", "/no/such/folder/file"])
def test_an_old_file_stays_if_it_cannot_be_replaced(target: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    (tmp_path / ".a.json.tmp").symlink_to(target)
    with pytest.raises(UserError, match="a.json cannot be written: .*; make room or fix the disk"):
        with files.replaced(path) as temporary:
            temporary.write_text("new" * 10_000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_not_replaced_by_an_incomplete_one(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replaced(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_lock_that_cannot_be_created_is_reported_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/.lock cannot be written: "):
        with WorkdirLock(tmp_path / "file"):
            raise AssertionError


@pytest.mark.parametrize("number", files.FULL)
def test_a_disk_that_fills_up_anywhere_is_reported_in_one_line(number: int, monkeypatch, capsys):
    def run(argv: list[str]) -> int:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["gates"]) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moejax: error: some/file cannot be written: {os.strerror(number)}")


def test_running_out_of_memory_is_reported_in_one_line(monkeypatch, capsys):
    def run(argv: list[str]) -> int:
        jax.block_until_ready(jax.jit(lambda: jnp.zeros((2**20, 2**20, 2**10)))())
        return 0

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["gates"]) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert "a device ran out of memory (RESOURCE_EXHAUSTED: " in line and "train.grad_accum" in line


def test_other_errors_of_the_system_are_not_hidden(monkeypatch):
    def run(argv: list[str]) -> int:
        raise OSError(errno.EBADF, "a mistake of ours")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(OSError, match="a mistake of ours"):
        cli.main(["gates"])
