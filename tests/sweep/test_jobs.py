"""Several trials at once, some of the trials, none: --jobs, --filter, --dry-run, --launcher."""

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.sweep.small import ALL, Small, at, wait_until

pytestmark = [pytest.mark.multiprocess, pytest.mark.usefixtures("small_trials")]


def test_several_trials_run_at_once_and_never_more_than_requested(tmp_path: Path):
    names = ["slow_1", "slow_2", "quick", "bad"]
    small, most = Small(tmp_path, *names), []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            if (small.folder / "journal.sqlite").exists():
                most.append(list(small.states().values()).count("running"))

    thread = threading.Thread(target=watch)
    thread.start()
    ended = small.run("--jobs=2")
    done.set()
    thread.join()
    assert ended.status == 1 and max(most) == 2
    assert all(small.steps(name) == ALL for name in names[:3])
    assert small.states() == dict.fromkeys(names[:3], "done") | {"bad": "failed"}
    assert "[4/4] bad-seed0 failed with status 1" in ended.out


def test_times_of_trials_that_run_at_once_are_matched_with_a_warning(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2")
    said = "not comparable; use --jobs=1"
    assert said not in small.run("--jobs=2", "--dry-run").out
    text = small.page.read_text()
    small.page.write_text(f'{text}\nMATCH, BASELINE = "step_time", "quick_1"\n')
    assert said not in small.run("--dry-run").out
    assert small.run("--jobs=2", "--dry-run").out.count(said) == 1
    ended = small.run("--jobs=2")
    assert ended.status == 0 and ended.out.count(said) == 1


def test_more_jobs_than_trials_are_allowed(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2")
    assert small.run("--jobs=50").status == 0
    assert small.steps("quick_1") == small.steps("quick_2") == ALL


def test_a_signal_reaches_every_running_trial_once_and_starts_no_other(tmp_path: Path):
    small = Small(tmp_path, "slow_1", "slow_2", "quick")
    thread = at(lambda: small.steps("slow_1") and small.steps("slow_2"), signal.SIGTERM)
    ended = small.run("--jobs=2")
    thread.join()
    assert ended.status == 75
    assert small.states() == {"slow_1": "preempted", "slow_2": "preempted", "quick": "pending"}
    for number, name in ((1, "slow_1"), (2, "slow_2")):
        assert f"[{number}/3] {name}-seed0 stopped; run the same command again" in ended.out
        assert small.log(name).count("asked") == 1
    assert small.run("--jobs=2").status == 0
    assert small.steps("slow_1") == small.steps("slow_2") == small.steps("quick") == ALL
    assert [entry.attempts for entry in small.entries().values()] == [2, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["group", "timeout"])
def test_sigterm_to_a_whole_process_group_reaches_the_trial_once(how: str, tmp_path: Path):
    """`timeout` signals its child, and then the group that they share."""
    small = Small(tmp_path, "rude")
    process = small.start(start_new_session=True)
    wait_until(lambda: small.steps("rude"))
    os.kill(process.pid, signal.SIGTERM)
    if how == "timeout":
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0  # rude saves at a second one only: it has come to its end
    assert small.log("rude").count("asked") == 1 and small.steps("rude") == ALL


# Some of the trials, and none.


def test_a_filter_runs_the_trials_it_matches_and_leaves_the_rest_for_later(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2", "other_1")
    ended = small.run("--filter=quick_2-*,oth*")
    assert ended.status == 0 and "[1/2] quick_2-seed0 done" in ended.out
    assert small.states() == {"quick_1": "pending", "quick_2": "done", "other_1": "done"}
    assert not small.workdir("quick_1").exists()
    ended = small.run()
    assert ended.status == 0 and "2 of 3 trials are already finished" in ended.out
    assert small.log("quick_2").count("begins") == 1


def test_a_filter_without_a_match_lists_the_trials_and_creates_nothing(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2")
    ended = small.run("--filter=quick_1*,quack*")
    assert ended.status == 2 and ended.err.count("\n") == 1
    assert "'quack*'; trials: quick_1-seed0, quick_2-seed0" in ended.err
    assert not small.folder.exists()


def test_a_dry_run_creates_nothing_and_lists_what_would_run(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2", "bad")
    ended = small.run("--dry-run")
    assert ended.status == 0 and "3 pending; 3 would be run" in ended.out
    assert not small.folder.exists()

    small.run("--filter=quick_1*,bad*")
    before = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*")}
    ended = small.run("--dry-run")
    assert ended.status == 0 and "1 failed, 1 done, 1 pending; 2 would be run" in ended.out
    assert {path: path.stat().st_mtime_ns for path in small.folder.rglob("*")} == before
    ended = small.run("--dry-run", "--filter=quick_1*")
    assert "1 done; 0 would be run" in ended.out and "bad" not in ended.out
    ended = small.run("--dry-run", "--filter=x")
    assert ended.status == 2


@pytest.mark.parametrize(
    "word, part",
    [
        ("--jobs=0", "--jobs=0 must be at least 1"),
        ("--launcher=cloud", "invalid choice: 'cloud'"),
        ("--launcher-option=gpus", "--launcher-option=gpus must be KEY=VALUE"),
        ("--launcher-option=gpus=1", "the launcher 'local' takes no options"),
    ],
)
def test_an_invalid_option_creates_nothing(word: str, part: str, tmp_path: Path):
    small = Small(tmp_path, "quick")
    ended = small.run(word)
    assert ended.status == 2 and ended.err.count("\n") == 1 and part in ended.err
    assert not small.folder.exists()
