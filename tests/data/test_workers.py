"""Jobs in several processes."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from moejax.data.workers import in_processes
from moejax.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def nothing() -> None:
    """Starts a process without anything to prepare."""


def write(folder: Path, job: int) -> None:
    time.sleep(0.05 * (3 - job % 4))
    (folder / str(job)).write_text(str(os.getpid()))


def fail(job: int) -> None:
    time.sleep(0.5 if job == 1 else 0)
    if job in (1, 2):
        raise UserError(f"job {job}")


def die(folder: Path, job: int) -> None:
    write(folder, job)
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_every_job_is_done_once_in_several_processes(tmp_path):
    done = list(in_processes(functools.partial(write, tmp_path), range(8), 3, nothing))
    assert sorted(done) == list(range(8))
    assert len({path.read_text() for path in tmp_path.iterdir()}) > 1


def test_the_failure_of_the_first_job_counts():
    with pytest.raises(UserError, match="job 1"):
        list(in_processes(fail, range(9), 3, nothing))


def test_a_killed_process_is_a_mistake_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"ended \(signal 9\), perhaps because memory ran out"):
        list(in_processes(functools.partial(die, tmp_path), range(6), 2, nothing))


def test_processes_end_when_nobody_wants_more_jobs(tmp_path):
    done = in_processes(functools.partial(write, tmp_path), range(9), 2, nothing)
    next(done)
    done.close()
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
