"""Runners that are killed: nothing is lost, and nothing is run twice."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.sweep.small import ALL, Small, at, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.usefixtures("small_trials"),
]


def test_a_trial_that_outlives_its_killed_runner_is_waited_for_and_not_run_twice(tmp_path: Path):
    small = Small(tmp_path, "slow", "quick")
    process = small.start()
    wait_until(lambda: small.steps("slow"))
    process.kill()
    process.wait()
    ended = small.run()
    assert ended.status == 0
    assert "slow-seed0 is still running, started by a runner that was killed" in ended.out
    assert small.log("slow").count("begins") == 1
    assert small.steps("slow") == small.steps("quick") == ALL


def test_a_trial_killed_with_its_runner_resumes(tmp_path: Path):
    small = Small(tmp_path, "slow")
    process = small.start()
    wait_until(lambda: small.steps("slow"))
    process.kill()
    os.kill(small.pid("slow"), signal.SIGKILL)
    process.wait()
    ended = small.run()
    assert ended.status == 0 and "still running" not in ended.out
    assert small.steps("slow") == ALL and small.log("slow").count("begins") == 2


@pytest.mark.parametrize("moment", ["reconcile", "begin", "locate", "end"])
def test_a_runner_killed_just_before_it_writes_loses_nothing(moment: str, tmp_path: Path):
    """`place`: the process exists, and no record identifies it."""
    small = Small(tmp_path, "slow", "quick")
    process = small.start(die=moment)
    assert process.wait(60) == -signal.SIGKILL
    if moment == "locate":
        wait_until(lambda: small.steps("slow"))
        assert (small.entries()["slow-seed0"].state, small.entries()["slow-seed0"].handle) == (
            "running", "",
        )  # fmt: skip
    ended = small.run()
    assert ended.status == 0 and set(small.states().values()) == {"done"}
    assert small.steps("slow") == small.steps("quick") == ALL
    assert small.log("slow").count("begins") == 1
    assert ("still running" in ended.out) == (moment == "locate")


def test_a_trial_that_outlived_its_runner_is_found_without_a_journal_too(tmp_path: Path):
    small = Small(tmp_path, "slow", "quick")
    process = small.start()
    wait_until(lambda: small.steps("slow"))
    process.kill()
    process.wait()
    (small.folder / "journal.sqlite").unlink()
    ended = small.run()
    assert ended.status == 0 and "slow-seed0 is still running" in ended.out
    assert small.log("slow").count("begins") == 1 and small.steps("slow") == ALL


def test_a_trial_that_outlived_its_runner_is_stopped_with_the_next_one(tmp_path: Path):
    small = Small(tmp_path, "slow")
    process = small.start()
    wait_until(lambda: small.steps("slow"))
    process.kill()
    process.wait()
    thread = at(lambda: len(small.steps("slow")) > 1, signal.SIGTERM)
    ended = small.run()
    thread.join()
    assert ended.status == 75 and small.states() == {"slow": "preempted"}
    assert small.log("slow").endswith("asked\nsaved\n") and small.steps("slow") != ALL
    assert small.run().status == 0 and small.steps("slow") == ALL


def test_every_trial_of_a_sweep_killed_repeatedly_does_every_step_once(tmp_path: Path):
    """Six lives of a runner of two trials at once end at moments that timing chooses."""
    names = [f"slow_{i}" for i in range(4)] + ["bad_then_good", "quick"]
    small = Small(tmp_path, *names)
    for life in range(6):
        process = small.start("--jobs=2", stdout=subprocess.PIPE)
        assert process.stdout and b"6 trials" in process.stdout.readline()
        time.sleep(0.1 * life)
        process.kill()
        process.communicate()
    first = small.run("--jobs=2")
    ended = first if first.status == 0 else small.run("--jobs=2")
    assert ended.status == 0, "bad_then_good may fail in the run before"
    assert set(small.states().values()) == {"done"}
    assert all(small.steps(name) == ALL for name in names)
    assert small.log("quick").count("begins") == 1


def test_only_one_of_two_simultaneous_runners_runs(tmp_path: Path):
    small = Small(tmp_path, "slow", "quick")
    pair = [small.start(stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=60)[1].decode() for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2]
    assert sum("in use by process" in err for err in said) == 1
    assert small.steps("slow") == small.steps("quick") == ALL
    assert small.log("slow").count("begins") == 1
