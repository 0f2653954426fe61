"""The program of a SLURM job of a sweep: it runs a trial's command in a child process.

The class travels to the job inside submitit's pickle, so neither moejax nor JAX is imported there:
this file imports only the standard library and submitit.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from typing import IO

SAVED = 75
STOP, TIME_IS_UP = signal.SIGUSR1, signal.SIGUSR2
"""The runner's signal to stop the trial, and SLURM's signal before the time limit."""
_POLL_SECONDS = 0.1


class TrialTask:
    """Run a command until it ends and return its exit status, which submitit keeps as the result.

    Three signals make the trial save and exit with 75; it gets SIGTERM for each of them:

        SIGUSR2   the time is nearly up: the job requeues itself
        SIGTERM   SLURM ends the job: it is preempted or requeued and will be restarted, or it is
                  cancelled. SLURM knows which, so the job leaves no result.
        SIGUSR1   the runner stops: the job ends with 75. A second one aborts the trial.

    Args:
      restarts: the number of restarts after which the job no longer requeues itself; a trial that
        never reaches its first checkpoint would otherwise restart forever.
    """

    def __init__(self, command: list[str], log: str, restarts: int):
        self.command, self.log, self.restarts = command, log, restarts

    def __call__(self) -> int:
        import submitit

        got: list[int] = []
        for number in (signal.SIGTERM, STOP, TIME_IS_UP):
            signal.signal(number, lambda number, _: got.append(number))
        job = submitit.JobEnvironment().job_id
        with open(self.log, "ab", buffering=0) as log:
            restarted = _restarts()
            if restarted:
                _note(log, f"SLURM job {job} starts again, {restarted} of {self.restarts} times")
            status = self._run(log, got)
            if status == SAVED and STOP not in got and TIME_IS_UP in got:
                if restarted < self.restarts:
                    return _requeue(job, log)
                _note(log, f"SLURM job {job} has started again {restarted} times: no more")
        if signal.SIGTERM in got and status != 0:
            sys.exit(SAVED)  # past submitit, which would keep a result
        return status

    def _run(self, log: IO[bytes], got: list[int]) -> int:
        """Run the command, forwarding signals as they arrive, and return its exit status."""
        trial = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        forwarded = 0
        while trial.poll() is None:
            time.sleep(_POLL_SECONDS)
            for number in got[forwarded:]:
                # A second SIGTERM aborts a trial, which only a second request to its runner means.
                if forwarded == 0 or (number == STOP and STOP in got[:forwarded]):
                    trial.terminate()
                forwarded += 1
        return trial.returncode


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _requeue(job: str, log: IO[bytes]) -> int:
    """Requeue the job and exit without a result; if SLURM refuses, return the trial's status."""
    try:
        subprocess.run(
            ["scontrol", "requeue", job], check=True, capture_output=True, timeout=60, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        _note(log, f"SLURM job {job} cannot be requeued: {getattr(error, 'stderr', '') or error}")
        return SAVED
    sys.exit(SAVED)


def _note(log: IO[bytes], what: str) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    log.write(f"# {now}  {' '.join(what.split())}\n".encode())
