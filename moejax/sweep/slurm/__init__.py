"""Trials as jobs of a SLURM cluster, through submitit: ``moejax sweep --launcher=slurm``.

    __init__.py  the launcher: submits, finds and stops jobs from the runner's machine
    options.py   the options, checked against the cluster before anything is written
    queue.py     the state of the jobs, from SLURM and from the files that jobs leave
    job.py       the program that runs in the job

Trials that start together are one job array in SLURM's queue. The handle of a job is its number,
such as 1234_7.
"""

import contextlib
import functools
import io
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.errors import UserError
from moejax.sweep.launch import Job, LaunchError, Start
from moejax.sweep.slurm import job as slurm_job
from moejax.sweep.slurm.options import Options, check_cluster, complaint, parse
from moejax.sweep.slurm.queue import JOB_NAME, Queue, ended_without_result, scancel

if TYPE_CHECKING:
    from moejax.sweep.definition import Trial

FOLDER = "slurm"
"""In the sweep's folder: submitit's scripts, pickles and logs."""


class SlurmLauncher:
    """Submits trials, one job each. See `moejax.sweep.launch.Launcher`."""

    jobs = 1000
    """No limit in practice: the cluster decides how many run."""
    queues = True

    def __init__(self, folder: Path, options: Mapping[str, str]):
        self._options = parse(options)
        check_cluster(self._options)
        self._folder = (folder / FOLDER).absolute()
        self._queue = Queue(self._folder, self._options.poll_seconds)

    def start(self, trial: "Trial", command: list[str], log: Path) -> Job:
        (job,) = self.start_all([Start(trial, command, log)], at_once=1)
        if isinstance(job, LaunchError):
            raise job
        return job

    def start_all(self, starts: Sequence[Start], at_once: int) -> list[Job | LaunchError]:
        tasks = [
            slurm_job.TrialTask(start.command, str(start.log.absolute()), self._options.restarts)
            for start in starts
        ]
        try:
            numbers = _submit(self._folder, self._options, tasks, at_once)
        except LaunchError as error:
            return [error for _ in starts]
        self._queue.forget()
        return [
            SlurmTrial(number, start.log, self._queue)
            for number, start in zip(numbers, starts, strict=True)
        ]

    def attach(self, trial: "Trial", handle: str, log: Path) -> Job | None:
        number = (
            handle
            if handle in self._writers.values()
            else self._writers.get(str(log.absolute()), "")
        )
        job = SlurmTrial(number, log, self._queue)
        return job if number and job.poll() is None else None

    @functools.cached_property
    def _writers(self) -> dict[str, str]:
        """The numbers of this sweep's jobs found in the queue at the start, by their trial's log.

        Raises:
          UserError: SLURM does not list the queue, so a trial could be started twice.
        """
        import submitit

        snapshot = self._queue.snapshot()
        if snapshot.at is None:
            raise UserError("--launcher=slurm: squeue does not answer; try again later")
        jobs = [submitit.SlurmJob[int](self._folder, number) for number in snapshot.jobs]
        tasks = {
            job.job_id: job.submission().function
            for job in jobs
            if job.paths.submitted_pickle.exists()
        }
        return {task.log: number for number, task in tasks.items()}


class SlurmTrial:
    """A job in SLURM's queue, or one that has left it. See `moejax.sweep.launch.Job`."""

    host = ""

    def __init__(self, number: str, log: Path, queue: Queue):
        self.handle, self._log, self._queue = number, log, queue
        self._stopping = False
        self._status: int | None = None
        self._missed_at: float | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._ask()
        return self._status

    def _ask(self) -> int | None:
        result = self._queue.result(self.handle)
        if result is not None:
            return result
        snapshot = self._queue.snapshot()
        state, host = snapshot.jobs.get(self.handle, ("", ""))
        if state:
            self.host, self._missed_at = host or self.host, None
            if self._stopping and state == "PENDING":  # SLURM was quicker to requeue it
                self._cancel()
        elif self._missed_at is None:
            self._missed_at = snapshot.at
        elif snapshot.at is not None and snapshot.at > self._missed_at:
            # Twice, because a result may become visible late on a shared disk.
            result = self._queue.result(self.handle, seconds=0.0)
            if result is None:
                result = ended_without_result(self.handle, self._log, self._queue.folder)
            if self._stopping and result == -slurm_job.STOP:
                return slurm_job.SAVED  # it came before the job could take it, or begin its trial
            return result
        return None

    def terminate(self) -> None:
        if self.poll() is not None:
            return
        self._stopping = True
        state, _ = self._queue.snapshot(seconds=1.0).jobs.get(self.handle, ("PENDING", ""))
        if state == "PENDING":
            self._cancel()
        else:
            scancel("--batch", f"--signal={slurm_job.STOP.name[3:]}", self.handle)

    def _cancel(self) -> None:
        """Remove the job from the queue; if it has just started, SLURM sends the trial SIGTERM."""
        scancel(self.handle)
        self._queue.forget()


def _submit(
    folder: Path, options: Options, tasks: Sequence[slurm_job.TrialTask], at_once: int
) -> list[str]:
    """Submit tasks, several of them as one array, and return the numbers of their jobs.

    Raises:
      LaunchError: SLURM does not accept them.
    """
    import cloudpickle
    import submitit
    from submitit.core.utils import (
        FailedSubmissionError,
        UncompletedJobError,
        environment_variables,
    )

    # The job's Python takes the place of the batch script's shell: SLURM's signals reach it.
    executor = submitit.SlurmExecutor(folder, python=f"exec {shlex.quote(sys.executable)}")
    executor.update_parameters(
        job_name=JOB_NAME,
        array_parallelism=at_once,
        use_srun=False,
        stderr_to_stdout=True,
        setup=[options.setup] if options.setup else None,
        # submitit's defaults for these do not suit every cluster.
        time=None,
        wckey=None,
        additional_parameters=options.sbatch(),
    )
    cloudpickle.register_pickle_by_value(slurm_job)
    # A runner inside a job must not pass that job's variables on.
    cluster = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        with (
            submitit.helpers.clean_env(),
            environment_variables(**cluster),
            contextlib.redirect_stderr(io.StringIO()),  # submitit prints what sbatch complains of
        ):
            return [job.job_id for job in executor.submit_array(tasks)]
    except (UncompletedJobError, FailedSubmissionError, OSError) as error:
        raise LaunchError(f"sbatch: {complaint(str(error))}") from error
    finally:
        cloudpickle.unregister_pickle_by_value(slurm_job)
