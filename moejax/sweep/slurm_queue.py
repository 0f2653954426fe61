"""How the SLURM jobs of a sweep are, without accounting.

SLURM is asked for all of a user's jobs of sweeps in one call, now and then. How a trial ended is in
the file that submitit leaves in the sweep's folder, which the cluster's machines share; for a job
that could not leave one, SLURM knows for some minutes.
"""

import dataclasses
import os
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from moejax.sweep import slurm_job
from moejax.sweep.launch import GONE

JOB_NAME = "moejax-sweep"
COMMAND_SECONDS = 60
"""How long a command of SLURM may take to answer."""

_STOPPED = ("CANCELLED", "PREEMPTED")
_LIST_SECONDS = 0.5
_TAIL_LINES = 8


@dataclasses.dataclass(frozen=True)
class Look:
    """The queue at a time: the host of each job, by its number; "" for one that waits."""

    at: float | None
    """None: SLURM has not answered since the last submission."""
    hosts: Mapping[str, str]


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

    def look(self) -> Look:
        """While SLURM does not answer, what it said last."""
        now = time.monotonic()
        if now - self._asked >= self._seconds:
            self._asked = now
            hosts = _squeue()
            if hosts is not None:
                self._look = Look(now, hosts)
        return self._look

    def result(self, number: str) -> int | None:
        """The exit status that a job has left; None while there is none."""
        now = time.monotonic()
        if now - self._listed >= _LIST_SECONDS:
            # Listing also brings a network file system's view of the folder up to date.
            self._listed = now
            self._names = set(os.listdir(self.folder)) if self.folder.exists() else set()
        from submitit.core.utils import JobPaths, pickle_load

        path = JobPaths(self.folder, number).result_pickle
        if path.name not in self._names:
            return None
        outcome, result = pickle_load(path)
        return result if outcome == "success" else None


def _squeue() -> dict[str, str] | None:
    """The hosts of this user's jobs of sweeps by their numbers; None if SLURM does not answer."""
    command = [
        "squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--name={JOB_NAME}",
        "--format=%i|%N",
    ]  # fmt: skip
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if said.returncode != 0:
        return None
    pairs = (line.strip().partition("|") for line in said.stdout.splitlines())
    return {number: host for number, _, host in pairs}


def ended_without_result(number: str, log: Path, folder: Path) -> int:
    """The exit status of a job that left the queue and no result, and a note of it in its log.

    It was cancelled (75, as for a trial that was stopped), or SLURM or the machine ended it, or it
    never came to run the trial; then what SLURM and the job itself said is noted too.
    """
    state, status = _show(number)
    lines = [f"SLURM job {number} ended: {state}"]
    if state.split(",")[0] not in _STOPPED:
        own = folder / f"{number}_0_log.out"
        if own.exists():
            lines += own.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    else:
        status = slurm_job.SAVED
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
        return "SLURM no longer knows how", GONE
    status, number_of_signal = map(int, ended.groups())
    return state[1], -number_of_signal or status or GONE
