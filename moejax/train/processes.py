"""Agreement between the processes of one job; the identity in a job of one process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax.errors import UserError

_MESSAGE_BYTES = 1000


def is_first() -> bool:
    """True if this process is the one that prints, and lists and moves files."""
    return jax.process_index() == 0


def from_first(value: int) -> int:
    """The first process's `value` (below 2**31), on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def shared_problem(problem: str) -> str:
    """The problem of the first process that has one, on every process; "" if none has.

    Call it before anything that only works if all processes continue: a process that stops alone
    leaves the others waiting.
    """
    if jax.process_count() == 1:
        return problem
    encoded = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = np.frombuffer(problem.encode()[:_MESSAGE_BYTES], np.uint8)
    encoded[: text.size] = text
    for row in np.asarray(multihost_utils.process_allgather(encoded)):
        if row.any():
            return row.tobytes().rstrip(b"\0").decode(errors="replace")
    return ""


def raise_together(problem: str) -> None:
    """Raises the problem of the first process that has one, on every process.

    Raises:
      UserError: a process has a problem.
    """
    problem = shared_problem(problem)
    if problem:
        raise UserError(problem)


def compiled_together(jitted: Any, *shapes: Any) -> Callable[..., Any]:
    """The jitted function; in a job of several processes it is compiled by all before any runs it.

    On CPU a process gives up the first collective of a group of devices after 30 seconds ("Gloo
    context initialization failed"), and a reduce-scatter at any time. Another process may need
    longer, to compile or for work that only the first process does. The barrier has no time limit.
    """
    if jax.process_count() == 1:
        return jitted
    compiled = jitted.lower(*shapes).compile()
    multihost_utils.sync_global_devices("moejax compiled")
    return compiled


def on_host(tree: Any) -> Any:
    """Whole copies of a tree's arrays on every process, however the arrays are sharded."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)
