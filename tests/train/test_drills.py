"""Long drills with real processes and real kills."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train import runs
from tests.train.disturb import end, start, until
from tests.train.runs import PREEMPTED, call, command
from tests.train.sharing import Whole

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

DRILLS = [
    ("config", 0, "SIGKILL", -9),
    ("save", 3, "SIGKILL", -9),
    ("step", 5, "SIGKILL", -9),
    ("end", 0, "SIGKILL", -9),
    ("step", 3, "SIGINT", PREEMPTED),
    ("save", 6, "SIGTERM", PREEMPTED),
    ("step", 7, "SIGINT+SIGTERM", -15),
    ("step", 7, "SIGTERM+SIGTERM", PREEMPTED),  # together: one request
    ("step", 8, "SIGTERM", 0),
]


@pytest.mark.parametrize("event, step, what, status", DRILLS)
def test_a_disturbed_and_an_undisturbed_process_end_bit_equal(
    event: str,
    step: int,
    what: str,
    status: int,
    whole: Whole,
    text: Path,
    tmp_path: Path,
):
    """The drills share one compilation; what they are compared with comes from another."""
    argv = command(tmp_path / "run", text)
    ended = end(start(event, step, what, argv))
    assert ended.status == status, ended
    ended = end(start("none", 0, "", argv))
    assert ended.status == 0, ended
    runs.same_run(tmp_path / "run", whole.workdir, whole.run)


def test_a_run_killed_repeatedly_at_any_moment_ends_bit_equal(
    whole: Whole, text: Path, tmp_path: Path
):
    """Five lives of one run of 60 steps end at moments that timing chooses, within seeded waits."""
    argv = command(tmp_path / "run", text, train__steps=60)
    random = np.random.default_rng(0)
    for _ in range(5):
        process = start("none", 0, "", argv)
        until("compiling the training step ...\n", process)
        time.sleep(random.uniform(0, 6))
        process.kill()
        assert end(process).status in (-signal.SIGKILL, 0)
    ended = end(start("none", 0, "", argv))
    assert ended.status == 0, ended
    argv = command(tmp_path / "other", text, train__steps=60)
    assert call(argv).status == 0
    runs.same_run(tmp_path / "run", tmp_path / "other", whole.run)
