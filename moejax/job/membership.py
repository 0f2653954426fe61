"""The one job that this process belongs to: joining it, and leaving it together."""

import traceback
from types import TracebackType

from moejax.errors import UserError
from moejax.job.member import GRACE, PATIENCE, Job, JobSpec
from moejax.job.rendezvous import await_all, connect

REPORT_FOR = 30.0
"""Seconds in which a process that failed before all had joined reports it to those that join."""

_current: Job | None = None
_tried = False
"""True if this process has tried to join its job; it tries once."""


def current() -> Job | None:
    """The job that this process belongs to; None for a single process."""
    return _current


def join(spec: JobSpec) -> Job:
    """Joins the job, and returns once all its processes have joined.

    Raises:
      UserError: they cannot reach each other.
    """
    global _current, _tried
    _tried = True
    _current = connect(spec)
    await_all(_current)
    return _current


def report(spec: JobSpec, problem: str, status: int, patience: float = REPORT_FOR) -> None:
    """Reports a failure to the processes of a job that this one has not joined.

    Does nothing if process 0 cannot be reached.
    """
    global _current
    if _tried:
        return
    try:
        _current = connect(spec, problem, status, patience)
    except UserError:  # the problem itself has been printed already
        return


def leave(status: int, problem: str = "") -> int:
    """Ends this process together with the others of its job; returns the status without a job."""
    job = _current
    if job is not None:
        job.fail(problem, status)
        job.leave(status, PATIENCE if job.begun.is_set() else REPORT_FOR)
    return status


def with_process(problem: str, spec: JobSpec | None) -> str:
    """A problem with the number of this process in front, if it is one of several."""
    job = _current
    spec = job.spec if job else spec
    if spec is None or (job and job.agreed) or problem.startswith("process "):
        return problem
    return f"process {spec.process}: {problem}"


class report_failure:  # in lower case, as it is used like a function
    """``with report_failure():`` reports an exception to the other processes before it unwinds.

    Code around it may wait for them, such as a checkpoint that is being saved.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        job = _current
        if job is None or error is None:
            return
        if isinstance(error, UserError):
            job.fail(described(error), 2)
        elif not job.other_failed.wait(GRACE):  # otherwise another's failure may be the cause
            job.fail(described(error), 1)


class leave_together:
    """``with leave_together():`` around a whole program, so that no process leaves a job alone."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        job = _current
        if job is None:
            return
        if error is None:
            job.announce_end()
            return
        if job.other_failed.wait(GRACE):
            job.follow()
        traceback.print_exception(kind, error, trace)
        leave(1, described(error))


def described(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
