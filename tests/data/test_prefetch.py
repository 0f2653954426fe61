"""Prefetching: order, look-ahead, errors, and the end of the thread."""

import threading
import time

import pytest

from moejax.data.prefetch import prefetch
from moejax.errors import UserError


def extra_threads(before) -> set:
    return set(threading.enumerate()) - before


def test_results_come_in_order():
    with prefetch(lambda step: step * step, 3, 50) as results:
        assert list(results) == [step * step for step in range(3, 50)]
        assert list(results) == []
    with prefetch(str, 5, 5) as results:
        assert list(results) == []
    with prefetch(lambda step: None, 0, 3) as results:
        assert list(results) == [None, None, None]


def test_the_function_gets_python_ints():
    with prefetch(type, 1, 3) as results:
        assert list(results) == [int, int]


def test_prefetching_runs_ahead_by_its_depth_and_no_further():
    started = []
    with prefetch(lambda step: started.append(step) or step, 0, 100, depth=3) as results:
        deadline = time.monotonic() + 10
        while len(started) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert started == [0, 1, 2]
        assert next(results) == 0
        while len(started) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert started == [0, 1, 2, 3]


def test_work_overlaps_with_the_consumer_in_one_other_thread():
    threads = []
    with prefetch(lambda step: threads.append(threading.current_thread()), 0, 20) as results:
        list(results)
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("error", [UserError("data.path: disk on fire"), SystemExit(3)])
def test_an_exception_reaches_the_consumer_in_its_place_and_ends_the_iteration(error):
    def fn(step):
        if step == 2:
            raise error
        return step

    with prefetch(fn, 0, 10, depth=5) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(type(error)) as caught:
            next(results)
        assert caught.value is error
        assert list(results) == []


def test_a_stop_iteration_inside_the_function_is_not_the_end():
    with prefetch(lambda step: next(iter(())), 0, 3) as results:
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(results)


def test_leaving_early_is_prompt_and_ends_the_thread():
    before = set(threading.enumerate())
    for consumed in (0, 1, 5):
        begin = time.monotonic()
        with prefetch(lambda step: step, 0, 1_000_000) as results:
            for _ in range(consumed):
                next(results)
            assert len(extra_threads(before)) == 1
        assert time.monotonic() - begin < 1.0
        assert not extra_threads(before)
        assert list(results) == []


def test_an_error_of_the_consumer_ends_the_thread_too():
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="diverged"):
        with prefetch(lambda step: step, 0, 1_000_000):
            raise ValueError("diverged")
    assert not extra_threads(before)


def test_leaving_does_not_wait_long_for_a_call_in_progress_and_starts_no_other():
    release, started, steps = threading.Event(), threading.Event(), []

    def fn(step):
        steps.append(step)
        started.set()
        release.wait(30)

    before = set(threading.enumerate())
    begin = time.monotonic()
    with prefetch(fn, 0, 3, timeout=0.1):
        assert started.wait(10)
    assert time.monotonic() - begin < 5.0
    release.set()
    for thread in extra_threads(before):
        thread.join(10)
    assert steps == [0]


def test_a_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="depth 0 must be at least 1"):
        with prefetch(str, 0, 3, depth=0):
            pass
