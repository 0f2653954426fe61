"""Trials as processes: failures, signals, kills and resuming. The processes run trial.py."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from moejax.errors import UserError
from moejax.sweep import pool, signals, summary
from moejax.sweep.definition import expand
from moejax.train import signals as train_signals
from moejax.train.workdir.lock import WorkdirLock
from tests.sweep.small import ALL, COMMAND, Small, at, wait_until
from tests.sweep.trial import STEPS

pytestmark = [pytest.mark.multiprocess, pytest.mark.usefixtures("small_trials")]


def test_a_failing_trial_shows_its_last_lines_and_does_not_stop_the_rest(tmp_path: Path):
    small = Small(tmp_path, "bad_then_good", "quick", "bad")
    ended = small.run()
    assert (ended.status, ended.err) == (1, "")
    assert "[2/3] quick-seed0 done in" in ended.out and "the table" in ended.out
    for number, name in ((1, "bad_then_good"), (3, "bad")):
        _, _, after = ended.out.partition(f"[{number}/3] {name}-seed0 failed with status 1")
        shown = [line for line in after.splitlines()[1:] if line.startswith("    | ")]
        # The last fifteen that are not empty; the error is one of them.
        wanted = [f"    | line {i}" for i in range(16, 30)] + ["    | moejax: diverged"]
        assert shown[:15] == wanted
    assert small.steps("quick") == ALL

    ended = small.run()
    assert ended.status == 1 and "1 of 3 trials are already finished" in ended.out
    assert "quick" not in ended.out and "[2/3] bad_then_good-seed0 done" in ended.out
    assert small.log("quick").count("begins") == 1
    assert small.log("bad_then_good").count("begins") == 2  # appended to, not overwritten


def test_a_finished_sweep_starts_nothing_and_ends_with_its_table(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2")
    assert small.run().status == 0
    ended = small.run()
    assert (ended.status, ended.err) == (0, "")
    assert "2 of 2 trials are already finished" in ended.out and "..." not in ended.out
    assert "the table" in ended.out and small.log("quick_1").count("begins") == 1


@pytest.mark.quick(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_trial_saves_and_the_same_command_resumes(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    small = Small(tmp_path, "slow", "quick")
    before = signal.getsignal(number)
    thread = at(lambda: small.steps("slow"), number)
    ended = small.run()
    thread.join()
    assert (
        ended.status == 75 and "[1/2] slow-seed0 stopped; run the same command again" in ended.out
    )
    assert "stopping the trials" in capfd.readouterr().err and "the table" not in ended.out
    assert small.log("slow").endswith("saved\n")
    assert not (small.folder / "summary.json").exists(), "nothing is finished"
    assert 1 <= len(small.steps("slow")) < STEPS and not small.workdir("quick").exists()
    assert signal.getsignal(number) == before

    assert small.run().status == 0
    assert small.steps("slow") == small.steps("quick") == ALL
    assert small.log("slow").count("begins") == 2


@pytest.mark.parametrize("broken", [False, True])
def test_a_stopped_sweep_writes_the_results_of_finished_trials(
    broken: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(*_: object) -> str:
        raise UserError("a file cannot be read")

    small = Small(tmp_path, "quick", "slow")
    if broken:
        monkeypatch.setattr(summary, "write", refuse)
    thread = at(lambda: small.steps("slow"), signal.SIGTERM)
    ended = small.run()
    thread.join()
    assert ended.status == 75 and "the table" not in ended.out
    assert (small.folder / "summary.json").exists() != broken
    said = f"moejax: {small.folder} has no new summary.json: a file cannot be read"
    assert (said in ended.err + capfd.readouterr().err) == broken


def test_a_second_signal_reaches_the_trial_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_signals, "MERGE_WITHIN", 0.01)
    monkeypatch.setattr(signals, "BETWEEN", 0.02)
    small = Small(tmp_path, "rude")
    threads = [at(lambda n=n: len(small.steps("rude")) >= n, signal.SIGTERM) for n in (1, 2)]
    assert small.run().status == 75
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.count("stopping the trials") == 2
    assert small.log("rude").endswith("saved\n")


def test_a_signal_in_the_last_trial_that_comes_too_late_to_stop_it_changes_nothing(tmp_path: Path):
    small = Small(tmp_path, "quick", "rude")
    thread = at(lambda: small.steps("rude"), signal.SIGTERM)
    ended = small.run()
    thread.join()
    assert ended.status == 0 and "the table" in ended.out and small.steps("rude") == ALL


def test_a_trial_that_is_stopped_by_someone_else_leaves_the_sweep_unfinished(tmp_path: Path):
    small = Small(tmp_path, "slow", "quick")

    def stop() -> None:
        wait_until(lambda: small.steps("slow"))
        os.kill(small.pid("slow"), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    ended = small.run()
    thread.join()
    assert ended.status == 75 and small.steps("quick") == ALL
    assert small.run().status == 0 and small.steps("slow") == ALL


def test_a_trial_changed_by_an_edit_of_the_file_fails(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "slow", "quick_2")
    text = small.page.read_text()

    def edit() -> None:
        wait_until(lambda: small.steps("slow"))
        small.page.write_text(text.replace("default()", "default(); config.moe.num_experts = 4"))

    thread = threading.Thread(target=edit)
    thread.start()
    ended = small.run()
    thread.join()
    assert ended.status == 1 and "[2/3] slow-seed0 done" in ended.out
    assert f"[3/3] quick_2-seed0 failed: {small.page} has been changed since" in ended.out
    ended = small.run()
    assert ended.status == 2 and "moe.num_experts=8, the experiment now has" in ended.err
    small.page.write_text(text)
    assert small.run().status == 0 and small.steps("quick_2") == ALL


def test_a_run_with_another_config_does_not_finish_the_trial(tmp_path: Path):
    """As when the file was edited just after it was looked at."""
    small = Small(tmp_path, "other", "quick")
    ended = small.run()
    assert ended.status == 1 and "other-seed0 left no finished run of this trial" in ended.out
    assert small.steps("quick") == ALL
    ended = small.run()
    assert ended.status == 2 and "the run in" in ended.err and "other-seed0 has moe" in ended.err


def test_a_second_runner_in_a_folder_is_refused(tmp_path: Path):
    small = Small(tmp_path, "quick")
    assert small.run().status == 0
    with WorkdirLock(small.folder, alone=True):
        ended = small.run()
    assert ended.status == 2 and f"in use by process {os.getpid()}" in ended.err
    assert ended.err.count("\n") == 1


def test_a_trials_command_is_the_one_a_user_would_type(tmp_path: Path):
    small = Small(tmp_path, "quick")
    sweep = expand(str(small.page))
    assert COMMAND(sweep.trials[0], sweep, small.folder) == [
        sys.executable, "-m", "moejax", "train", f"--config={small.page}", "--config.moe.d_ff=8",
        f"--workdir={small.workdir('quick')}",
    ]  # fmt: skip


def test_the_tail_of_a_log_is_short_and_from_one_attempt(tmp_path: Path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"old\n" * 3 + b"\xff new\n\n" + b"x" * 30_000 + b"\nlast\n")
    assert pool.tail(log, begin=12)[-1] == "last" and "old" not in pool.tail(log, begin=12)
    log.write_bytes(b"old\n" * 3 + b"\xff new\n")
    assert pool.tail(log, begin=12) == ["\N{REPLACEMENT CHARACTER} new"]
    assert pool.tail(log, begin=log.stat().st_size) == []
