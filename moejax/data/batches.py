"""Batches as a pure function of the global step, evaluation batches, and prefetching.

A token stream is cut into rows: windows of `seq_len + 1` tokens with stride `seq_len`, so that
inputs `tokens[:, :-1]` and targets `tokens[:, 1:]` are one shift apart and every token after the
first is a target exactly once an epoch. The data position of a run is one integer, the global
step: batch b is rows b*B .. (b+1)*B of the epochs laid end to end, each a seeded permutation.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer

from moejax.errors import UserError

Batch = dict[str, np.ndarray]


def num_rows(num_tokens: int, seq_len: int) -> int:
    """How many full rows a stream of `num_tokens` gives."""
    return max(num_tokens - 1, 0) // seq_len


def endless_order(num_rows: int, seed: int) -> Any:
    """Which row is at any position: epoch after epoch, each with a permutation of its own."""
    import grain  # slow to import

    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()


class TrainBatches:
    """Shuffled batches of a token stream, for any step, in any order.

    Args:
      tokens_N: token ids, possibly memory-mapped; at least `seq_len + 1`.
      seq_len: targets per row (L).
      batch_size: rows per global batch (B).
      seed: the permutations' seed, in [0, 2**32).
    """

    def __init__(
        self, tokens_N: Integer[np.ndarray, " N"], seq_len: int, batch_size: int, seed: int
    ):
        if seq_len < 1 or batch_size < 1:
            raise UserError(
                f"train.seq_len, train.batch_size: {seq_len} and {batch_size} must be at least 1"
            )
        if not 0 <= seed < 1 << 32:
            raise UserError(f"train.seed: {seed} is not in [0, 2**32)")
        self.num_rows = num_rows(len(tokens_N), seq_len)
        if self.num_rows == 0:
            raise UserError(_too_short("training", len(tokens_N), seq_len))
        self._tokens_N, self._seq_len, self._batch_size = tokens_N, seq_len, batch_size
        self._order = endless_order(self.num_rows, seed)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of one step, or some of its rows (a host's share).

        Returns `tokens` int32 [B, L+1], `valid` bool [B, L] (all true) and `row` int32 [B], the
        global row id `step*B + i` modulo 2**31. With `rows`, the same arrays sliced by it; only
        those rows are read.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        shares = range(self._batch_size)[rows if rows is not None else slice(None)]
        positions = [step * self._batch_size + i for i in shares]
        windows = [int(self._order[position]) for position in positions]
        return {
            "tokens": _read_rows(self._tokens_N, windows, self._seq_len),
            "valid": np.ones((len(positions), self._seq_len), dtype=bool),
            "row": np.array([position % (1 << 31) for position in positions], dtype=np.int32),
        }


def eval_batches(
    heldout_N: Integer[np.ndarray, " N"], seq_len: int, batch_size: int, rows: int
) -> list[Batch]:
    """Batches of `rows` rows spread evenly over the held-out stream, the same at every call.

    Fewer if the stream has fewer. The last batch is filled up with rows of token 0 that are
    `valid=False`. Keys and shapes as in `TrainBatches.batch`; `row` counts the rows of this list.
    """
    if rows < 1:
        raise UserError(f"train.eval_rows: {rows} must be at least 1")
    windows = eval_windows(len(heldout_N), seq_len, rows)
    if not windows:
        raise UserError(_too_short("held-out", len(heldout_N), seq_len))
    batches = []
    for begin in range(0, len(windows), batch_size):
        chosen = windows[begin : begin + batch_size]
        tokens = np.zeros((batch_size, seq_len + 1), dtype=np.int32)
        valid = np.zeros((batch_size, seq_len), dtype=bool)
        tokens[: len(chosen)] = _read_rows(heldout_N, chosen, seq_len)
        valid[: len(chosen)] = True
        row = np.arange(begin, begin + batch_size, dtype=np.int32)
        batches.append({"tokens": tokens, "valid": valid, "row": row})
    return batches


def eval_windows(num_tokens: int, seq_len: int, rows: int) -> list[int]:
    """Where in the held-out stream the rows of `eval_batches` begin, in units of `seq_len`."""
    available = num_rows(num_tokens, seq_len)
    count = min(rows, available)
    return [j * available // count for j in range(count)]


def _read_rows(tokens_N: np.ndarray, windows: list[int], seq_len: int) -> np.ndarray:
    rows = np.empty((len(windows), seq_len + 1), dtype=np.int32)
    for i, window in enumerate(windows):
        rows[i] = tokens_N[window * seq_len : (window + 1) * seq_len + 1]
    return rows


def _too_short(which: str, num_tokens: int, seq_len: int) -> str:
    more = "give more text in data.path"
    if which == "held-out":
        more = "raise data.eval_fraction or " + more
    return (
        f"train.seq_len: the {which} text has {num_tokens} tokens, but one row of train.seq_len="
        f"{seq_len} needs {seq_len + 1}; lower train.seq_len or {more}"
    )


class Prefetcher:
    """Iterates `fn(start), fn(start + 1), ..., fn(stop - 1)`, computed ahead in one thread.

    At most `depth` results wait. What `fn` raises is raised by `next()` in its place in the order,
    and again by every later `next()`. After `close()` iteration ends. The thread is a daemon, so a
    run that dies without `close()` still exits. Use it as a context manager where possible.
    """

    def __init__(self, fn: Callable[[int], Any], start: int, stop: int, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth {depth} must be at least 1")
        self._ready: deque[Any] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(fn, start, stop, depth), name="prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, fn: Callable[[int], Any], start: int, stop: int, depth: int) -> None:
        error: BaseException | None = None
        try:
            for step in range(start, stop):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < depth)
                    if self._closed:
                        return
                result = fn(step)
                with self._changed:
                    self._ready.append(result)
                    self._changed.notify_all()
        except StopIteration as caught:  # would pass for the end of the iteration
            error = RuntimeError(f"fn raised {caught!r}")
        except BaseException as caught:  # carried to the consumer, which raises it
            error = caught
        finally:
            with self._changed:
                self._error, self._finished = error, True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._closed:
                raise StopIteration
            if self._ready:
                result = self._ready.popleft()
                self._changed.notify_all()
                return result
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self, timeout: float = 1.0) -> None:
        """Stops the thread. Waits for an unfinished `fn` call at most `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
