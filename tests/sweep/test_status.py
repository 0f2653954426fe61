"""Reports on a sweep while it runs and after: its status, the progress of a run, the live table."""

import io
import json
import os
import signal
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from moejax import cli
from moejax.sweep import folder as folders
from moejax.sweep import journal, screen, status
from moejax.sweep.definition import expand
from moejax.sweep.journal import DONE, FAILED, PENDING, RUNNING, Entry
from moejax.train.metrics.log import MetricsLog
from tests.sweep.small import Small, wait_until
from tests.train.runs import refused

small_sweep = pytest.mark.usefixtures("small_trials")


def row_of(out: str, name: str) -> list[str]:
    """The cells of the trial's line."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name}-seed0 ")]
    return line.split()[1:]


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# How far a run is.


def test_progress_comes_from_the_last_rows(tmp_path: Path):
    with MetricsLog(tmp_path, resume_step=None) as log:
        assert status.read_progress(tmp_path) == status.Progress()
        for step in (3, 6):
            log.write(
                {"step": step, "split": "train", "loss": 1 / step, "moe/load": [[0.1] * 9000]}
            )
            log.timing({"step": step, "seconds_per_step": step / 8})
        log.write({"step": 7, "split": "eval", "loss": 9.0})
    assert status.read_progress(tmp_path) == status.Progress(
        step=7, loss=1 / 6, seconds_per_step=0.75
    )
    assert status.read_progress(tmp_path).seconds_left(steps=11) == 4 * 0.75
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": "9"}\n{"step": 9, "split": "train", "lo')  # damaged; torn by a kill
    assert status.read_progress(tmp_path) == status.Progress(
        step=7, loss=1 / 6, seconds_per_step=0.75
    )


def test_without_rows_progress_is_unknown(tmp_path: Path):
    assert status.read_progress(tmp_path / "nothing") == status.Progress(0, None, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": "NaN"}\n')
    (tmp_path / "timings.jsonl").write_text('{"step": 1, "seconds_per_step": "NaN"}\n')
    found = status.read_progress(tmp_path)
    assert found.step == 1 and found.loss != found.loss and found.seconds_per_step is None
    assert found.seconds_left(steps=5) is None


def line(state: str, *, step: int = 0, rate: float | None = None, seconds: float | None = None):
    entry = Entry("0", f"{state}-seed0", state, attempts=1, host="here")
    return status.Line(entry, 100, status.Progress(step, 1.5, rate), seconds)


def test_the_time_left_is_that_of_running_steps_and_of_waiting_trials(tmp_path: Path):
    """(40 steps x 3 s + 20 x 6 s + 2 trials x 200 s) / 2 at once = 320 s."""
    running = [line(RUNNING, step=60, rate=3.0), line(RUNNING, step=80, rate=6.0)]
    done = [line(DONE, step=100, seconds=s) for s in (150.0, 250.0)]
    waiting = [line(PENDING), line(PENDING)]
    assert status.summary([*done, *running, *waiting]) == (
        "2 done, 2 running, 2 pending; about 5m20s left"
    )
    assert status.summary([*running, *waiting]) == "2 running, 2 pending"  # how long is a trial?
    assert status.summary([*done, line(RUNNING)]) == "2 done, 1 running"  # it compiles
    assert status.summary([*done, line(FAILED)]) == "1 failed, 2 done"


def test_a_line_shows_state_attempts_host_time_step_loss_and_the_time_left():
    cells = line(RUNNING, step=60, rate=3.0, seconds=185.2).cells
    assert cells == ("running-seed0", "running", "1", "here", "3m05s", "60/100", "1.5000", "2m00s")
    assert line(DONE, step=100, rate=3.0).cells[-1] == "-"
    assert status.duration(3725) == "1h02m" and status.duration(None) == "-"


# moejax sweep status.


@pytest.mark.parametrize("name", ["", "nothing", "run"])
def test_a_folder_without_a_sweep_is_reported_in_one_line_with_status_2(name: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    refused(["sweep", "status", f"--workdir={tmp_path / name}"], "holds no sweep")
    assert not (tmp_path / "nothing").exists() and len(list(tmp_path.rglob("*"))) == 2


def test_status_takes_no_options_of_a_run(tmp_path: Path):
    refused(["sweep", "status", f"--workdir={tmp_path}", "--jobs=2"], "remove --jobs")
    refused(["sweep", "status", f"--workdir={tmp_path}", "--dry-run"], "remove --dry-run")
    refused(["sweep", "stats", f"--workdir={tmp_path}"], "invalid choice: 'stats'")
    refused(["sweep", f"--workdir={tmp_path}"], "--experiment", "moejax sweep --help")


@small_sweep
def test_status_of_a_running_sweep_is_that_of_its_journal_and_its_runs(tmp_path: Path):
    small, seen = Small(tmp_path, "quick", "slow", "waits"), []

    def look() -> None:
        wait_until(lambda: small.steps("slow"))
        row = {"step": 2, "split": "train", "loss": 0.25}
        (small.workdir("slow") / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        trials = folders.read_trials(small.folder)
        seen.append(status.known(small.folder, trials))
        seen.append(status.lines(small.folder, trials, seen[0][0]))

    thread = threading.Thread(target=look)
    thread.start()
    assert small.run().status == 0
    thread.join()
    (_, problems), found = seen
    assert problems == []
    quick, slow, waits = (status.table([one]).splitlines()[1].split() for one in found)
    host = os.uname().nodename
    assert quick[1:4] == ["done", "1", host] and quick[5] == "5/5"
    assert slow[1:4] == ["running", "1", host] and slow[5:7] == ["2/5", "0.2500"]
    assert waits[1:] == ["pending", "-", "-", "-", "0/5", "-", "-"]
    assert 0 <= found[1].seconds < 60


@small_sweep
def test_status_after_the_sweep_changes_nothing_and_shows_how_it_ended(tmp_path: Path):
    small = Small(tmp_path, "quick", "bad")
    small.run()
    small.run()
    before = snapshot(small.folder)
    ended = small.status()
    assert (ended.status, ended.err) == (0, "") and snapshot(small.folder) == before
    assert row_of(ended.out, "quick")[:2] == ["done", "1"]
    assert row_of(ended.out, "bad")[:2] == ["failed", "2"]
    assert ended.out.endswith("\n1 failed, 1 done\n")


@small_sweep
@pytest.mark.parametrize("what", ["lost", "damaged"])
def test_without_a_journal_status_comes_from_the_workdirs(what: str, tmp_path: Path):
    small = Small(tmp_path, "quick", "bad")
    small.run()
    path = small.folder / journal.NAME
    path.unlink()
    if what == "damaged":
        path.write_bytes(b"x" * 5000)
    before = snapshot(small.folder)
    ended = small.status()
    assert (ended.status, ended.err) == (0, "") and snapshot(small.folder) == before
    assert row_of(ended.out, "quick")[:3] == ["done", "-", "-"]
    assert row_of(ended.out, "bad")[0] == "pending"
    wanted = {"lost": "there is no journal.sqlite", "damaged": "journal.sqlite cannot be read"}
    assert wanted[what] in ended.out.splitlines()[-1]


@small_sweep
def test_workdirs_override_the_journal_in_the_status(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2", "bad")
    small.run()
    (small.workdir("quick_2") / "summary.png").unlink()
    (small.workdir("bad") / "config.json").write_text("{")
    (small.workdir("bad") / "metrics.jsonl").touch()
    (small.workdir("bad") / "summary.png").touch()
    ended = small.status()
    assert ended.status == 0
    states = [row_of(ended.out, name)[0] for name in ("quick_1", "quick_2", "bad")]
    assert states == ["done", "pending", "unreadable"]
    assert "config.json is not valid JSON" in ended.out.splitlines()[-1]


@small_sweep
def test_status_and_the_runner_report_damaged_rows_and_configs_in_one_line(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2", "quick_3")
    small.run()
    whole = (small.workdir("quick_1") / "metrics.jsonl").read_text()
    (small.workdir("quick_1") / "metrics.jsonl").write_text('{"step": 5}\n')
    (small.workdir("quick_2") / "metrics.jsonl").write_text('{"step": 1}\n' + whole)
    saved = {"config": ["moe"], "fingerprint": "", "baselines": {}}
    (small.workdir("quick_3") / "config.json").write_text(json.dumps(saved))
    ended = small.status()
    assert (ended.status, ended.err) == (0, "")
    states = [row_of(ended.out, f"quick_{i}")[0] for i in (1, 2, 3)]
    assert states == ["pending", "done", "unreadable"]
    assert "quick_3-seed0/config.json was not written by" in ended.out.splitlines()[-1]
    refused(small.words, "quick_3-seed0/config.json was not written by")


@small_sweep
@pytest.mark.slow
@pytest.mark.multiprocess
def test_status_distinguishes_running_trials_from_killed_ones(tmp_path: Path):
    small = Small(tmp_path, "slow")
    process = small.start()
    wait_until(lambda: small.steps("slow"))
    process.kill()
    process.wait()
    assert row_of(small.status().out, "slow")[0] == "running"
    os.kill(small.pid("slow"), signal.SIGKILL)
    wait_until(lambda: row_of(small.status().out, "slow")[0] == "killed")
    assert "1 killed" in small.status().out
    assert small.states() == {"slow": "running"}, "only a runner writes the journal"


# The live table.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@small_sweep
def test_on_a_terminal_the_table_is_live_and_lines_stay_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small, shown = Small(tmp_path, "quick", "bad"), Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(small.words) == 1
    out = shown.getvalue()
    assert "\x1b[?25l" in out and out.count("\x1b[?25h") >= 1, "the cursor is given back"
    assert "[1/2] quick-seed0 done in" in out and "    | moejax: diverged" in out
    *_, last = out.split("left")
    assert "5/5" in last and "1 failed, 1 done" in last and "the table" in last


def test_a_low_terminal_shows_running_trials_and_the_number_of_hidden_ones():
    found = [line(DONE) for _ in range(40)] + [line(RUNNING), line(FAILED)]
    file = io.StringIO()
    Console(file=file, width=120, height=12).print(screen.render(found, height=12))
    out = file.getvalue()
    assert len(out.splitlines()) <= 11
    assert "running-seed0" in out and "failed-seed0" in out and "(35 not shown)" in out


def test_the_time_of_a_running_trial_counts_its_current_attempt(tmp_path: Path):
    small = Small(tmp_path, "a")
    (trial,) = expand(str(small.page)).trials
    started = datetime.now().astimezone().replace(microsecond=0)
    entry = Entry(trial.id, trial.name, RUNNING, 3, started=started.isoformat(), seconds=1e6)
    (found,) = status.lines(tmp_path, [trial], {trial.name: entry})
    assert found.seconds is not None and 0 <= found.seconds < 60
