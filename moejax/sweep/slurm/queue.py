"""The state of a sweep's SLURM jobs, without SLURM's accounting.

One call at intervals lists all jobs of a user's sweeps. The exit status of a trial is in the file
that submitit leaves in the sweep's folder, which the cluster's machines share; for a job that could
not leave one, SLURM remembers it for some minutes.
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
"""Timeout of a SLURM command."""

_STOPPED = ("CANCELLED", "PREEMPTED")
_FORGOTTEN = "SLURM no longer knows how"
_LIST_SECONDS = 0.5
_TAIL_LINES = 8


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The queue at one time: the state and the host of each job, by its number.

    The host is "" for a waiting job; the state is SLURM's word, such as PENDING.
    """

    at: float | None
    """None: SLURM has not answered since the last submission."""
    jobs: Mapping[str, tuple[str, str]]


class Queue:
    """A cache of the state of all jobs.

    Args:
      folder: submitit's folder.
      seconds: the age at which a snapshot expires.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self._seconds = folder, seconds
        self._snapshot, self._asked = Snapshot(None, {}), float("-inf")
        self._names: set[str] = set()
        self._listed = float("-inf")

    def forget(self) -> None:
        """Discard the snapshot, because jobs have just been changed."""
        self._snapshot, self._asked = Snapshot(None, {}), float("-inf")

    def snapshot(self, seconds: float | None = None) -> Snapshot:
        """The queue at most so many seconds ago, or the last known one if SLURM does not answer."""
        now = time.monotonic()
        if now - self._asked >= (self._seconds if seconds is None else seconds):
            self._asked = now
            jobs = _squeue()
            if jobs is not None:
                self._snapshot = Snapshot(now, jobs)
        return self._snapshot

    def result(self, number: str, seconds: float = _LIST_SECONDS) -> int | None:
        """The exit status that a job has left; None without one. Lists files at that interval."""
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
    """This user's jobs of sweeps, as in `Snapshot`; None if SLURM does not answer."""
    command = [
        "squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--name={JOB_NAME}",
        "--format=%i|%T|%N",
    ]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if result.returncode != 0:
        return None
    rows = (line.strip().split("|") for line in result.stdout.splitlines())
    return {number: (state, host) for number, state, host in rows}


def scancel(*words: str) -> None:
    """Run scancel, which does nothing to a job that has ended; the queue shows its effect."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", *words], capture_output=True, timeout=COMMAND_SECONDS)


def ended_without_result(number: str, log: Path, folder: Path) -> int:
    """The exit status of a job that left the queue without a result, with a note in its log.

    The job was cancelled (75, as for a stopped trial), or SLURM or the machine ended it, or it
    failed before it ran the trial; then the messages of SLURM and of the job are noted too.
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
    """SLURM's state of a job that has ended, and its exit status."""
    try:
        output = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", number],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        ).stdout
    except subprocess.TimeoutExpired:
        output = ""
    state = re.search(r"\bJobState=(\S+)", output)
    ended = re.search(r"\bExitCode=(\d+):(\d+)", output)
    if state is None or ended is None:
        return _FORGOTTEN, GONE
    status, number_of_signal = map(int, ended.groups())
    return state[1], -number_of_signal or status or GONE
