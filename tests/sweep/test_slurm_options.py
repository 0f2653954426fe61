"""Options of --launcher=slurm and messages of SLURM's commands, without a SLURM."""

import sys
from pathlib import Path
from typing import Any

import pytest

from moejax.errors import UserError
from moejax.sweep import launch
from moejax.sweep.slurm import options as slurm_options
from moejax.sweep.slurm.options import complaint, parse

NOBODY: Any = None  # the launcher does not look at the trial


def test_options_become_long_options_of_sbatch():
    assert parse({}).sbatch() == {"signal": "B:USR2@90", "requeue": True}
    words = {
        "partition": "gpu", "account": "lab", "time": "30", "cpus": "4", "gpus": "2", "mem": "1.5",
        "save_seconds": "120", "slurm_gres": "gpu:a100:1", "slurm_mem-bind": "local",
        "slurm_exclusive": "", "restarts": "0", "poll_seconds": "2.5", "setup": "module load cuda",
    }  # fmt: skip
    options = parse(words)
    assert options.sbatch() == {
        "partition": "gpu", "account": "lab", "time": "30", "cpus-per-task": "4",
        "gpus-per-node": "2", "mem": "1536M", "gres": "gpu:a100:1", "mem-bind": "local",
        "exclusive": True, "signal": "B:USR2@120", "requeue": True,
    }  # fmt: skip
    assert (options.restarts, options.poll_seconds) == (0, 2.5)
    assert options.setup == "module load cuda"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"partitoin": "gpu"}, "partitoin=gpu.*did you mean 'partition'.*slurm_NAME"),
        ({"time": "1:00:00"}, "time=1:00:00 must be a whole number, at least 1"),
        ({"time": "0"}, "time=0 must be a whole number"),
        ({"cpus": "-1"}, "cpus=-1 must be"),
        ({"mem": "16G"}, "mem=16G must be a number"),
        ({"mem": "nan"}, "mem=nan must be a number"),
        ({"account": ""}, "account= is empty"),
        ({"time": "1"}, "save_seconds=90 leaves nothing of time=1"),
        ({"slurm_array": "0-7"}, "the launcher decides 'array' itself"),
        ({"slurm_ntasks": "2"}, "a trial is one process on one node"),
        ({"slurm_partition": "gpu"}, "write it as partition"),
        ({"slurm_": "gpu"}, "followed by a long option of sbatch"),
        ({"slurm_wrap x": "gpu"}, "followed by a long option of sbatch"),
    ],
)
def test_a_mistake_in_an_option_is_reported_in_one_line_that_names_it(
    words: dict[str, str], said: str
):
    with pytest.raises(UserError, match=said) as raised:
        parse(words)
    assert "\n" not in str(raised.value)


def test_without_submitit_or_slurm_the_launcher_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(UserError, match=r"pip install 'moejax\[slurm\]'"):
            launch.make("slurm", folder, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no command 'sbatch' here"):
        launch.make("slurm", folder, {})
    assert not folder.exists()


def test_an_error_of_sbatch_is_reported_in_one_line():
    said = (
        "sbatch: error: invalid partition: nope\nsbatch: error: Batch job submission failed: no\n"
    )
    assert complaint(said) == "invalid partition: nope; Batch job submission failed: no"
    assert complaint(" \n") == "SLURM refuses and does not say why"


class FakeCommands:
    """Commands of SLURM that say what a file of their name holds, and fail without it."""

    def __init__(self, folder: Path):
        self._folder = folder
        for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
            program = folder / name
            program.write_text(f"#!/bin/sh\nexec /bin/cat {folder}/{name}.says\n")
            program.chmod(0o755)
        self.say("sbatch", "")

    def say(self, name: str, what: str | None) -> None:
        path = self._folder / f"{name}.says"
        if what is None:
            path.unlink()
        else:
            path.write_text(what)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return FakeCommands(folder)


@pytest.fixture
def launcher(commands: FakeCommands, tmp_path: Path) -> launch.Launcher:
    return launch.make("slurm", tmp_path / "sweep", {"poll_seconds": "0.001"})


def submit(launcher: launch.Launcher, commands: FakeCommands, log: Path) -> launch.Job:
    commands.say("sbatch", "Submitted batch job 7\n")
    return launcher.start(NOBODY, ["true"], log)


def test_while_slurm_does_not_answer_no_job_has_ended(
    commands: FakeCommands, launcher: launch.Launcher, tmp_path: Path
):
    job = submit(launcher, commands, tmp_path / "log.txt")
    assert job.handle == "7"
    assert [job.poll() for _ in range(5)] == [None] * 5  # squeue fails
    commands.say("squeue", "7|RUNNING|node3\n")
    assert job.poll() is None and job.host == "node3"
    commands.say("squeue", None)
    assert [job.poll() for _ in range(5)] == [None] * 5
    commands.say("squeue", "8|RUNNING|node3\n")
    commands.say("scontrol", "JobId=7 JobState=OUT_OF_MEMORY Reason=x ExitCode=0:9 RunTime=3\n")
    assert [job.poll() for _ in range(3)] == [None, -9, -9]
    assert (tmp_path / "log.txt").read_text().count("SLURM job 7 ended: OUT_OF_MEMORY") == 1


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("JobState=TIMEOUT ExitCode=0:15", -15),
        ("JobState=NODE_FAIL ExitCode=1:0", 1),
        ("JobState=COMPLETED ExitCode=0:0", launch.GONE),
        ("JobState=PREEMPTED ExitCode=0:15", 75),
        (None, 75),
    ],
)
def test_a_job_that_left_no_result_ends_with_the_state_slurm_reports(
    said: str | None, status: int, commands: FakeCommands, launcher: launch.Launcher, tmp_path: Path
):
    """A job unknown to SLURM and without output never began."""
    job = submit(launcher, commands, tmp_path / "log.txt")
    commands.say("squeue", "")
    if said is not None:
        commands.say("scontrol", said)
    assert [job.poll() for _ in range(2)] == [None, status]


def test_a_runner_that_cannot_see_the_queue_starts_nothing(
    launcher: launch.Launcher, tmp_path: Path
):
    with pytest.raises(UserError, match="squeue does not answer"):
        launcher.attach(NOBODY, "7", tmp_path / "log.txt")


def test_a_submission_that_slurm_refuses_is_a_trial_that_failed(
    commands: FakeCommands, launcher: launch.Launcher, tmp_path: Path
):
    commands.say("sbatch", None)
    with pytest.raises(launch.LaunchError, match="sbatch: .*No such file"):
        launcher.start(NOBODY, ["true"], tmp_path / "log.txt")


def test_every_option_of_the_launcher_is_in_its_page():
    page = (Path(__file__).parents[2] / "docs/slurm.md").read_text()
    for name in slurm_options.Options.__dataclass_fields__:
        assert f"`{name}`" in page or name == "extra"
