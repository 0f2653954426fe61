"""Jobs in several processes, whose failures and ends leave nothing behind.

Unlike a pool of ``concurrent.futures``, the processes end with the one that started them, however
it ends, and at once when it is interrupted; and of several failures that of the first job counts,
so that a message does not depend on which process was fastest.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from moejax.errors import UserError


def in_processes(
    do: Callable[[Any], None], jobs: Sequence[Any], workers: int, start: Callable[[], None]
) -> Generator[int]:
    """Do the jobs; yield the number of each when it is done.

    Args:
      do: called in a process with each job. It, ``start`` and the jobs are sent there.
      jobs: started in their order.
      workers: number of processes.
      start: called once in each process before the first job.

    Raises:
      UserError: a process was killed.
      Exception: what ``do`` raised for the first job that failed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    processes: list[Any] = []
    pipes: dict[Connection, Any] = {}
    todo, running = iter(range(len(jobs))), dict[Connection, int]()
    failed: dict[int, BaseException] = {}

    def give(pipe: Connection) -> None:
        """The next job to a process that has none."""
        number = next(todo, None) if not failed else None
        if number is not None:
            running[pipe] = number
            pipe.send(jobs[number])

    resource_tracker.ensure_running()  # started below, it would let interruptions through
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, do, start), daemon=True)
            # Until the process ignores interruptions, which end it together with this one.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            theirs.close()
            processes.append(process)
            pipes[ours] = process
        for pipe in pipes:
            give(pipe)
        while running and not (failed and min(failed) < min(running.values())):
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                try:
                    error = pipe.recv()
                except (EOFError, OSError) as broken:
                    raise UserError(_killed(pipes[pipe])) from broken
                number = running.pop(pipe)
                if error is None:
                    yield number
                else:
                    failed[number] = error
                give(pipe)
        if failed:
            raise failed[min(failed)]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _killed(process: Any) -> str:
    process.join(5)
    code = process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
    return (
        f"a process of the preparation ended ({how}), perhaps because memory ran out; run the same "
        "command again to go on, with fewer workers"
    )


def _work(pipe: Connection, do: Callable[[Any], None], start: Callable[[], None]) -> None:
    """The life of a process: jobs until the one that started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starting process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        error: BaseException | None = None
        try:
            do(job)
        except Exception as raised:  # the parent raises it
            error = raised
        pipe.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
