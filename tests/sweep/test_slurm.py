"""Trials as jobs of a real SLURM controller on this machine; tests/slurm_cluster.py starts it."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moejax.errors import UserError
from moejax.sweep import launch
from moejax.sweep.launch import Job, Start
from moejax.sweep.slurm import options as slurm_options
from tests import slurm_cluster
from tests.slurm_cluster import Cluster
from tests.sweep.small import wait_until
from tests.train.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

NOBODY: Any = None  # the launcher does not look at the trial
FAST = {"poll_seconds": "0.3"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from a_cluster("linuxproc")


@pytest.fixture
def signals_to_the_group_alone() -> Iterator[Cluster]:
    yield from a_cluster("pgid")


def a_cluster(proctrack: str) -> Iterator[Cluster]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    pytest.importorskip("submitit", reason="pip install 'moejax[slurm]'")
    with (
        slurm_cluster.running(proctrack=proctrack) as running,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


class Sweep:
    """Trials of tests/sweep/slow_trial.py and others, and the launcher that starts them."""

    def __init__(self, folder: Path, **options: Any):
        self.folder = folder
        self.options = {**FAST, **{name: str(value) for name, value in options.items()}}
        self.launcher = self.new_launcher()

    def new_launcher(self) -> launch.Launcher:
        """As that of a runner that is begun again."""
        return launch.make("slurm", self.folder, self.options)

    def start(self, lives: int, seconds: float = 0.3) -> Job:
        """A trial that ends in the last of its lives, and before only when it is stopped."""
        (job,) = self.start_all({"trial": self.slow("trial", lives, seconds)})
        return job

    def slow(self, name: str, lives: int, seconds: float = 0.3) -> list[str]:
        program = f"{ROOT}/tests/sweep/slow_trial.py"
        return [sys.executable, program, str(self.folder / name), str(lives), str(seconds)]

    def start_all(self, commands: dict[str, list[str]], at_once: int = 100) -> list[Job]:
        starts = [Start(NOBODY, words, self.log(name)) for name, words in commands.items()]
        for start in starts:
            start.log.touch()
        jobs = self.launcher.start_all(starts, at_once)
        assert not [job for job in jobs if isinstance(job, launch.LaunchError)]
        return jobs  # pyright: ignore[reportReturnType]

    def log(self, name: str = "trial") -> Path:
        return self.folder / f"{name}.txt"

    def said(self, name: str = "trial") -> str:
        return self.log(name).read_text()

    def steps(self, name: str = "trial") -> int:
        """The progress of the trial, which did every step once and in order."""
        path = self.folder / name / "steps"
        steps = path.read_text().split() if path.exists() else []
        assert steps == [str(i + 1) for i in range(len(steps))]
        return len(steps)

    def lives(self, name: str = "trial") -> int:
        return len((self.folder / name / "lives").read_text().splitlines())

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 60
        while self.steps() < step:
            assert time.monotonic() < end, "the trial does not get on"
            time.sleep(0.05)


def wait(jobs: Sequence[Job], seconds: float = 150) -> list[int | None]:
    end = time.monotonic() + seconds
    while any(job.poll() is None for job in jobs):
        assert time.monotonic() < end, "a job does not end"
        time.sleep(0.05)
    return [job.poll() for job in jobs]


def test_trials_that_start_together_form_one_array_with_a_limit_on_running_jobs(
    cluster: Cluster, tmp_path: Path
):
    sweep = Sweep(tmp_path)
    times = "import time; print(time.time()); time.sleep(1.5); print(time.time()); exit({})"
    commands = {f"trial_{i}": [sys.executable, "-c", times.format(i)] for i in range(5)}
    jobs = sweep.start_all(commands, at_once=2)
    array = jobs[0].handle.partition("_")[0]
    assert [job.handle for job in jobs] == [f"{array}_{i}" for i in range(5)]
    assert wait(jobs) == [0, 1, 2, 3, 4]
    assert "localhost" in {job.host for job in jobs}  # seen now and then
    spans = [tuple(map(float, sweep.said(name).split())) for name in commands]
    together = [sum(begin <= other[0] < end for other in spans) for begin, end in spans]
    assert max(together) == 2  # of four CPUs


def test_the_process_beside_a_trial_has_no_jax(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path)
    look = "import os; print('jax' in open(f'/proc/{os.getppid()}/maps').read())"
    (job,) = sweep.start_all({"trial": [sys.executable, "-c", look]})
    assert wait([job]) == [0] and sweep.said() == "False\n"


def test_a_trial_whose_time_is_up_saves_is_requeued_and_resumes(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path, time=1, save_seconds=50)
    job = sweep.start(lives=2, seconds=1)
    assert wait([job]) == [0]
    assert sweep.lives() == 2 and sweep.steps() > 2
    assert sweep.said().count("after 1 SIGTERM\n") == 1
    assert f"SLURM job {job.handle} starts again, 1 of 100 times" in sweep.said()


def test_a_trial_that_was_restarted_too_often_is_left_stopped(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path, restarts=0)
    job = sweep.start(lives=9)
    sweep.wait_for_step(1)
    cluster.ask("scancel", "--batch", "--signal=USR2", job.handle)
    assert wait([job]) == [75]
    assert f"SLURM job {job.handle} has started again 0 times: no more" in sweep.said()


def test_a_requeued_job_resumes_its_trial(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path)
    job = sweep.start(lives=2)
    sweep.wait_for_step(2)
    cluster.ask("scontrol", "requeue", job.handle)
    assert wait([job]) == [0]
    assert sweep.lives() == 2 and sweep.steps() > 4
    assert "saved at step" in sweep.said()


def test_a_job_that_is_preempted_resumes_its_trial(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path)
    job = sweep.start(lives=2)
    sweep.wait_for_step(2)
    words = ["--partition=urgent", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.ask("sbatch", *words)
    assert wait([job]) == [0]
    assert sweep.lives() == 2 and sweep.steps() > 4
    assert "saved at step" in sweep.said()


def test_a_trial_saves_where_slurm_signals_the_group_of_the_job(
    signals_to_the_group_alone: Cluster, tmp_path: Path
):
    sweep = Sweep(tmp_path)
    job = sweep.start(lives=2)
    sweep.wait_for_step(2)
    signals_to_the_group_alone.ask("scontrol", "requeue", job.handle)
    assert wait([job]) == [0]
    assert sweep.lives() == 2 and sweep.steps() > 4


def test_a_runner_that_stops_lets_trials_save_and_takes_waiting_ones_out_of_the_queue(
    cluster: Cluster, tmp_path: Path
):
    sweep = Sweep(tmp_path)
    running = sweep.start(lives=9)
    sweep.wait_for_step(1)
    later = {name: sweep.slow(name, lives=9) for name in "ab"}
    first, waiting = sweep.start_all(later, at_once=1)
    while not (tmp_path / "a" / "steps").exists():
        time.sleep(0.05)
    for job in (running, first, waiting):
        job.terminate()
    assert wait([running, first, waiting]) == [75, 75, 75]
    assert "after 1 SIGTERM\n" in sweep.said() and not (tmp_path / "b").exists()
    assert sweep.lives() == 1
    wait_until(lambda: not cluster.jobs())


def test_a_second_stop_aborts_the_trial(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path)
    job = sweep.start(lives=9, seconds=15)
    while not (tmp_path / "trial" / "steps").exists():
        time.sleep(0.05)
    job.terminate()
    time.sleep(3)  # the trial takes those within a second for one
    job.terminate()
    assert wait([job]) == [99]


def test_a_cancelled_job_is_a_stopped_trial_and_its_log_records_it(
    cluster: Cluster, tmp_path: Path
):
    sweep = Sweep(tmp_path)
    job = sweep.start(lives=9)
    sweep.wait_for_step(1)
    cluster.ask("scancel", job.handle)
    assert wait([job]) == [75]
    assert "saved at step" in sweep.said()
    assert sweep.said().endswith(f"SLURM job {job.handle} ended: CANCELLED\n")


def test_a_job_that_dies_fails_with_its_status_and_the_message_of_slurm(
    cluster: Cluster, tmp_path: Path
):
    sweep = Sweep(tmp_path)
    kill = "import os, time; os.kill(os.getppid(), 9); time.sleep(60)"
    (job,) = sweep.start_all({"trial": [sys.executable, "-c", kill]})
    assert wait([job]) == [-9]
    assert f"SLURM job {job.handle} ended: FAILED" in sweep.said()

    sweep = Sweep(tmp_path, setup="echo no such module; exit 3")
    (job,) = sweep.start_all({"other": [sys.executable, "-c", ""]})
    assert wait([job]) == [3]
    assert "no such module" in sweep.said("other")


def test_a_restarted_runner_finds_the_jobs_of_the_previous_one(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(tmp_path)
    first, second = sweep.start_all({name: sweep.slow(name, lives=9) for name in "ab"})
    other = Sweep(tmp_path / "other")
    assert other.launcher.attach(NOBODY, "", other.log("a")) is None

    again = sweep.new_launcher()
    for name, job, handle in (("a", first, first.handle), ("b", second, "")):
        found = again.attach(NOBODY, handle, sweep.log(name))
        assert found is not None and found.handle == job.handle
        found.terminate()
        assert wait([found]) == [75]
    before = sweep.said("a")
    again = sweep.new_launcher()
    assert again.attach(NOBODY, first.handle, sweep.log("a")) is None
    assert again.attach(NOBODY, "somewhere:17", sweep.log("a")) is None
    assert sweep.said("a") == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partition": "nope"}, "nvalid partition"),
        ({"cpus": "5"}, "Requested node configuration is not available"),
        ({"slurm_constraint": "a100"}, "Invalid feature specification"),
        ({"slurm_nonsense": "1"}, "nonsense"),
    ],
)
def test_options_the_cluster_would_refuse_are_reported_before_anything_is_created(
    options: dict[str, str], said: str, cluster: Cluster, tmp_path: Path
):
    with pytest.raises(UserError, match=said) as raised:
        launch.make("slurm", tmp_path / "sweep", options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    wait_until(lambda: not cluster.jobs())


def test_options_reach_the_job(cluster: Cluster, tmp_path: Path):
    sweep = Sweep(
        tmp_path, partition="urgent", time=7, cpus=3, mem=0.5, setup="export SAID=hello",
        slurm_comment="two words", slurm_nice="5",
    )  # fmt: skip
    show = "import os; print(os.environ['SAID'], os.environ['SLURM_CPUS_PER_TASK'])"
    wait_for_it = f"{show}; import time; time.sleep(60)"
    (job,) = sweep.start_all({"trial": [sys.executable, "-uc", wait_for_it]})
    while sweep.said() != "hello 3\n":
        time.sleep(0.05)
    shown = cluster.ask("scontrol", "show", "job", job.handle)
    for what in (
        "Partition=urgent",
        "TimeLimit=00:07:00",
        "MinMemoryNode=512M",
        "Comment=two words",
    ):
        assert what in shown
    assert "Requeue=1" in shown and slurm_options.parse({}).time is None
    job.terminate()
    assert wait([job]) == [-15]
