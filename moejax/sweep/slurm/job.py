"""What a SLURM job of a sweep does: runs a trial's command as a process of its own.

The class travels to the job inside submitit's pickle, so nothing of moejax, and no JAX, is imported
there: the imports of this file are the standard library's and submitit.
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
"""What the runner sends for SIGTERM to the trial; what SLURM sends before the time limit."""
_POLL_SECONDS = 0.1


class TrialTask:
    """Runs a command until it ends and gives its exit status; submitit keeps that as the result.

    Three signals make the trial save and leave with 75; it gets SIGTERM for each of them:

        SIGUSR2   the time is nearly up: the job puts itself back into the queue
        SIGTERM   SLURM ends the job: it is preempted or requeued, then SLURM starts it again, or it
                  is cancelled. Either way that is SLURM's to say, and the job leaves no result.
        SIGUSR1   the runner stops: the job ends, with 75. A second one aborts the trial.

    Args:
      restarts: how often SLURM may have started the job again when it puts itself into the queue;
        a trial that never gets as far as its first checkpoint would go round forever.
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
        """The exit status of the command, which gets the signals as they come in."""
        trial = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        seen = 0
        while trial.poll() is None:
            time.sleep(_POLL_SECONDS)
            for number in got[seen:]:
                # A second SIGTERM aborts a trial: only its runner, asked twice, means that.
                if seen == 0 or (number == STOP and STOP in got[:seen]):
                    trial.terminate()
                seen += 1
        return trial.returncode


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _requeue(job: str, log: IO[bytes]) -> int:
    """Leaves without a result for the queue; if SLURM refuses, with the trial's status."""
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
