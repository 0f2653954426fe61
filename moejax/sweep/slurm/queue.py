"""How the SLURM jobs of a sweep are, without accounting.

SLURM is asked for all of a user's jobs of sweeps in one call, now and then. How a trial ended is in
the file that submitit leaves in the sweep's folder, which the cluster's machines share; for a job
that could not leave one, SLURM knows for some minutes.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from moejax.sweep.launch import GONE
from moejax.sweep.slurm import job as slurm_job

JOB_NAME = "moejax-sweep"
COMMAND_SECONDS = 60
"""How long a command of SLURM may take to answer."""

_STOPPED = ("CANCELLED", "PREEMPTED")
_FORGOTTEN = "SLURM no longer knows how"
_LIST_SECONDS = 0.5
_TAIL_LINES = 8


@dataclasses.dataclass(frozen=True)
class Look:
    """The queue at a time: the state and the host of each job, by its number.

    The host is "" for a job that waits; the state is SLURM's word, as PENDING.
    """

    at: float | None
    """None: SLURM has not answered since the last submission."""
    jobs: Mapping[str, tuple[str, str]]


class Queue:
    """What is known about all jobs, asked for again when it is old.

    Args:
      folder: submitit's folder.
      seconds: how old an answer of SLURM may be.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self._seconds = folder, seconds
        self._look, self._asked = Look(None, {}), float("-inf")
        self._names: set[str] = set()
        self._listed = float("-inf")

    def forget(self) -> None:
        """The jobs have just been changed: no older answer counts."""
        self._look, self._asked = Look(None, {}), float("-inf")

    def look(self, seconds: float | None = None) -> Look:
        """Not older than so many seconds, if SLURM answers; else what it said last."""
        now = time.monotonic()
        if now - self._asked >= (self._seconds if seconds is None else seconds):
            self._asked = now
            jobs = _squeue()
            if jobs is not None:
                self._look = Look(now, jobs)
        return self._look

    def result(self, number: str, seconds: float = _LIST_SECONDS) -> int | None:
        """The exit status that a job left at least so many seconds ago; None if it did not."""
        now = time.monotonic()
        if now - self._listed >= seconds:
            # Listing also brings a network file system's view of the folder up to date.
            self._listed = now
            self._names = set(os.listdir(self.folder)) if self.folder.exists() else set()
        from submitit.core.utils import JobPaths, pickle_load

        path = JobPaths(self.folder, number).result_pickle
        if path.name not in self._names:
            return None
        outcome, result = pickle_load(path)
        return result if outcome == "success" else None


def _squeue() -> dict[str, tuple[str, str]] | None:
    """This user's jobs of sweeps, as in `Look`; None if SLURM does not answer."""
    command = [
        "squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--name={JOB_NAME}",
        "--format=%i|%T|%N",
    ]  # fmt: skip
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if said.returncode != 0:
        return None
    rows = (line.strip().split("|") for line in said.stdout.splitlines())
    return {number: (state, host) for number, state, host in rows}


def scancel(*words: str) -> None:
    """Does nothing to a job that has ended; whether it did anything, the queue says."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", *words], capture_output=True, timeout=COMMAND_SECONDS)


def ended_without_result(number: str, log: Path, folder: Path) -> int:
    """The exit status of a job that left the queue and no result, and a note of it in its log.

    It was cancelled (75, as for a trial that was stopped), or SLURM or the machine ended it, or it
    never came to run the trial; then what SLURM and the job itself said is noted too.
    """
    state, status = _show(number)
    own = folder / f"{number}_0_log.out"
    lines = [f"SLURM job {number} ended: {state}"]
    if state.split(",")[0] in _STOPPED:
        status = slurm_job.SAVED
    elif own.exists():
        lines += own.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    elif state == _FORGOTTEN:  # SLURM forgets tasks of an array that are cancelled while they wait
        lines, status = [f"SLURM job {number} left the queue before it began"], slurm_job.SAVED
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    with open(log, "a") as file:
        file.write("".join(f"# {now}  {line}\n" for line in lines))
    return status


def _show(number: str) -> tuple[str, int]:
    """SLURM's word for how a job ended, and its exit status."""
    try:
        said = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", number],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        ).stdout
    except subprocess.TimeoutExpired:
        said = ""
    state = re.search(r"\bJobState=(\S+)", said)
    ended = re.search(r"\bExitCode=(\d+):(\d+)", said)
    if state is None or ended is None:
        return _FORGOTTEN, GONE
    status, number_of_signal = map(int, ended.groups())
    return state[1], -number_of_signal or status or GONE
