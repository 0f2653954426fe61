"""The local launcher: processes, their locks on the log, and those that outlived their runner."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.errors import UserError
from moejax.sweep import launch
from moejax.sweep.definition import Trial, expand
from moejax.sweep.journal import Journal
from moejax.sweep.launch import GONE, Job, Launcher, LaunchError
from tests.sweep.small import Small, wait_until
from tests.train.runs import refused

TRIAL = Trial("a", 0, (), {"train": {"steps": 5}})
SLEEP = [sys.executable, "-c", "import time; print('begins', flush=True); time.sleep(60)"]
ORPHAN = """
import sys
from pathlib import Path
from moejax.sweep.launch import LocalLauncher
job = LocalLauncher(Path(), {}).start(None, ["sleep", "60"], Path(sys.argv[1]))
print(job.handle)
"""


@pytest.fixture
def local(tmp_path: Path) -> Launcher:
    return launch.make("local", tmp_path, {})


def end(job: Job) -> int:
    wait_until(lambda: job.poll() is not None)
    status = job.poll()
    assert status is not None
    return status


@pytest.mark.parametrize("code, status", [("", 0), ("raise SystemExit(7)", 7)])
def test_a_job_gives_the_status_of_its_process(
    code: str, status: int, local: Launcher, tmp_path: Path
):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    job = local.start(TRIAL, [sys.executable, "-c", f"print('said'); {code}"], log)
    assert end(job) == end(job) == status
    assert log.read_text() == "before\nsaid\n"
    assert job.host == socket.gethostname()


def test_a_job_is_found_as_long_as_it_runs_and_can_be_stopped(local: Launcher, tmp_path: Path):
    log = tmp_path / "log.txt"
    assert local.attach(TRIAL, "", log) is None
    job = local.start(TRIAL, SLEEP, log)
    found = local.attach(TRIAL, job.handle, log)
    assert found is not None and (found.handle, found.host) == (job.handle, job.host)
    number = int(job.handle.rpartition(":")[2])
    assert found.poll() is None and os.getsid(number) == number
    with pytest.raises(LaunchError, match="cannot be started"):
        local.start(TRIAL, SLEEP, log)
    found.terminate()
    assert end(job) == -signal.SIGTERM and end(found) == end(found) == GONE
    found.terminate()  # and does nothing
    assert local.attach(TRIAL, job.handle, log) is None
    assert end(local.start(TRIAL, [sys.executable, "-c", ""], log)) == 0


@pytest.mark.parametrize("handle", ["", "elsewhere:{pid}"])
def test_a_job_that_may_be_on_another_machine_is_found_and_not_signalled(
    handle: str, local: Launcher, tmp_path: Path
):
    log = tmp_path / "log.txt"
    job = local.start(TRIAL, SLEEP, log)
    number = job.handle.rpartition(":")[2]
    found = local.attach(TRIAL, handle.format(pid=number), log)
    assert found is not None and found.host == handle.partition(":")[0]
    found.terminate()
    time.sleep(0.2)
    assert job.poll() is None and found.poll() is None
    job.terminate()
    assert end(job) == -signal.SIGTERM and end(found) == GONE


@pytest.mark.slow
def test_a_job_lives_on_without_its_runner_in_a_session_of_its_own(local: Launcher, tmp_path: Path):
    log = tmp_path / "log.txt"
    ended = subprocess.run([sys.executable, "-c", ORPHAN, log], capture_output=True, check=True)
    handle = ended.stdout.decode().strip()
    number = int(handle.rpartition(":")[2])
    assert os.getsid(number) == number and launch.may_live(handle)
    found = local.attach(TRIAL, handle, log)
    assert found is not None
    found.terminate()
    assert end(found) == GONE
    wait_until(lambda: not launch.may_live(handle))
    assert launch.may_live(f"elsewhere:{number}") and launch.may_live("")


def test_a_failed_start_is_reported_in_one_line(local: Launcher, tmp_path: Path):
    for command, log in (
        (["/no/such/program"], tmp_path / "log"),
        (SLEEP, tmp_path / "no" / "log"),
    ):
        with pytest.raises(LaunchError) as error:
            local.start(TRIAL, command, log)
        assert "No such file" in str(error.value) and "\n" not in str(error.value)


def test_an_option_that_a_launcher_does_not_take_is_a_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="--launcher-option gpus=.*takes no options"):
        launch.make("local", tmp_path, {"gpus": "1"})


ATTACHED: list[tuple[str, str]] = []


class Elsewhere:
    """A launcher of another kind, whose job ends as soon as it is asked for."""

    def __init__(self, folder: Path, options: dict[str, str]):
        self.handle, self.host = "7", "node"

    def attach(self, trial: Trial, handle: str, log: Path) -> "Elsewhere":
        ATTACHED.append((trial.name, handle))
        return self

    def poll(self) -> int:
        return GONE


@pytest.mark.usefixtures("small_trials")
def test_a_trial_is_polled_by_the_launcher_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A trial started by another launcher than the present one; the journal records which."""
    small = Small(tmp_path, "quick")
    assert small.run().status == 0
    (small.workdir("quick") / "summary.png").unlink()
    with Journal(small.folder) as record:
        (trial,) = expand(str(small.page)).trials
        record.begin(trial, "elsewhere")
        record.locate(trial, "7", "node")
    refused(small.words, "started with --launcher=elsewhere and may still be running")
    monkeypatch.setitem(launch.LAUNCHERS, "elsewhere", f"{__name__}:Elsewhere")
    ended = small.run()
    assert ended.status == 0 and "quick-seed0 is still running" in ended.out
    assert ATTACHED == [("quick-seed0", "7")]
    (entry,) = small.entries().values()
    assert (entry.state, entry.launcher, entry.attempts) == ("done", "local", 3)


def test_all_launchers_can_be_imported(tmp_path: Path):
    for name in launch.LAUNCHERS:
        module, _, attribute = launch.LAUNCHERS[name].partition(":")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)
