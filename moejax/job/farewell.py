"""The one job that this process is part of, and its end."""

import traceback
from types import TracebackType

from moejax.errors import UserError
from moejax.job.client import GRACE, PATIENCE, Job, Place
from moejax.job.rendezvous import await_all, connect

LATE = 30.0
"""Seconds in which a process that has failed before all were there tells those that come."""

_current: Job | None = None
_sought = False
"""Whether this process has looked for its job: once is enough."""


def current() -> Job | None:
    """The job that this process is part of; None for a process alone."""
    return _current


def join(place: Place) -> Job:
    """Joins the job, and returns once all its processes are there.

    Raises:
      UserError: they cannot come together.
    """
    global _current, _sought
    _sought = True
    _current = connect(place)
    await_all(_current)
    return _current


def tell(place: Place, problem: str, status: int, patience: float = LATE) -> None:
    """Tells the other processes of a job, which this one has not joined, that it has failed.

    Does nothing if process 0 is not found.
    """
    global _current
    if _sought:
        return
    try:
        _current = connect(place, problem, status, patience)
    except UserError:  # the problem itself has been said already
        return


def leave(status: int, problem: str = "") -> int:
    """Ends this process together with the others of its job; the status, for a process alone."""
    job = _current
    if job is not None:
        job.fail(problem, status)
        job.leave(status, PATIENCE if job.begun.is_set() else LATE)
    return status


def named(problem: str, place: Place | None) -> str:
    """A problem as this process says it: with its number, if it is one of several."""
    job = _current
    place = job.place if job else place
    if place is None or (job and job.agreed) or problem.startswith("process "):
        return problem
    return f"process {place.process}: {problem}"


class telling:  # noqa: N801  (used as a function is)
    """``with telling():`` an exception inside is told to the other processes before it unwinds.

    What is around may wait for them: a checkpoint that is being saved does.
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
        elif not job.told.wait(GRACE):  # else it may be the consequence of another's end
            job.fail(described(error), 1)


class farewell:  # noqa: N801
    """``with farewell():`` around all that a process does, so that none leaves a job alone."""

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
            job.part()
            return
        if job.told.wait(GRACE):
            job.follow()
        traceback.print_exception(kind, error, trace)
        leave(1, described(error))


def described(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
