"""Results of a function of the step, computed ahead while the devices work."""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any


@contextlib.contextmanager
def prefetch(
    fn: Callable[[int], Any], start: int, stop: int, depth: int = 2, timeout: float = 1.0
) -> Iterator[Iterator[Any]]:
    """Iterate over ``fn(start), fn(start + 1), ..., fn(stop - 1)``, computed ahead in one thread.

    At most ``depth`` results are computed ahead. An exception of ``fn`` is raised by ``next()`` at
    its place in the order, and the iteration ends there. On leaving the context no further call is
    started, and the thread is awaited for ``timeout`` seconds if it is inside ``fn``.
    """
    import grain  # slow to import

    if depth < 1:
        raise ValueError(f"depth {depth} must be at least 1")
    workers: set[threading.Thread] = set()

    def call(step: int) -> Any:
        workers.add(threading.current_thread())
        return fn(step)

    def in_order() -> Generator[Any, None, None]:
        # Inside a generator a StopIteration of ``fn`` is a RuntimeError, not the end.
        for _ in range(start, stop):
            yield next(ahead)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=depth)
    steps = grain.MapDataset.range(start, stop).map(call)
    ahead = iter(steps.to_iter_dataset(options, allow_nones=True))
    results = in_order()
    try:
        ahead.start_prefetch()
        yield results
    finally:
        ahead.close()
        results.close()
        for worker in workers:
            worker.join(timeout)
