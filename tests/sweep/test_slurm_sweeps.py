"""Whole sweeps on a real SLURM controller: ``moejax sweep --launcher=slurm``."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import caching
from tests.slurm_cluster import Cluster
from tests.sweep.small import ALL, Small, at, wait_until
from tests.sweep.test_slurm import a_cluster
from tests.sweep.test_sweep import write_page
from tests.train import runs
from tests.train.runs import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.usefixtures("small_trials"),
]
SLURM = ("--launcher=slurm", "--launcher-option=poll_seconds=0.3")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from a_cluster("linuxproc")


def test_a_trial_that_fails_is_reported_and_the_others_finish(cluster: Cluster, tmp_path: Path):
    small = Small(tmp_path, "quick", "bad_then_good", "slow")
    ended = small.run(*SLURM, "--jobs=2")
    assert (ended.status, ended.err) == (1, "")
    assert "[2/3] bad_then_good-seed0 failed with status 1" in ended.out
    assert "    | moejax: diverged" in ended.out and "the table" in ended.out
    assert small.steps("quick") == small.steps("slow") == ALL
    entries = [entry for _, entry in sorted(small.entries().items())]
    assert [entry.state for entry in entries] == ["failed", "done", "done"]
    array = {entry.handle.partition("_")[0] for entry in entries}
    assert len(array) == 1 and {entry.launcher for entry in entries} == {"slurm"}
    assert entries[2].host == "localhost"

    ended = small.run(*SLURM)
    assert ended.status == 0 and "2 of 3 trials are already finished" in ended.out
    assert small.log("quick").count("begins") == 1
    assert small.log("bad_then_good").count("begins") == 2


def test_a_runner_killed_with_kill_9_leaves_its_jobs_and_the_next_one_waits_for_them(
    cluster: Cluster, tmp_path: Path
):
    small = Small(tmp_path, "slow_1", "slow_2", "slow_3")
    process = small.start(*SLURM, "--jobs=1")
    wait_until(lambda: small.steps("slow_1"))
    process.kill()
    process.wait()
    ended = small.run(*SLURM, "--jobs=1")
    assert ended.status == 0 and ended.out.count("is still running, started by a runner") >= 2
    assert [small.log(f"slow_{i}").count("begins") for i in (1, 2, 3)] == [1, 1, 1]
    assert set(small.states().values()) == {"done"}


def test_a_runner_killed_before_it_noted_its_job_does_not_start_the_trial_twice(
    cluster: Cluster, tmp_path: Path
):
    small = Small(tmp_path, "slow_1", "slow_2")
    assert small.start(*SLURM, "--jobs=1", die="locate").wait(60) == -signal.SIGKILL
    assert {entry.handle for entry in small.entries().values()} == {""}
    ended = small.run(*SLURM, "--jobs=1")
    assert ended.status == 0 and "is still running, started by a runner" in ended.out
    for name in ("slow_1", "slow_2"):
        assert small.log(name).count("begins") == 1 and small.steps(name) == ALL


def test_a_stopped_runner_stops_its_jobs_and_the_same_command_resumes(
    cluster: Cluster, tmp_path: Path
):
    small = Small(tmp_path, "slow_1", "slow_2")
    thread = at(lambda: small.steps("slow_1"), signal.SIGTERM)
    ended = small.run(*SLURM, "--jobs=1")
    thread.join()
    assert ended.status == 75 and ended.out.count("stopped; run the same command again") == 2
    assert small.log("slow_1").endswith("asked\nsaved\n") and not small.steps("slow_2")
    assert set(small.states().values()) == {"preempted"}
    wait_until(lambda: not cluster.jobs())
    assert small.run(*SLURM).status == 0
    assert small.steps("slow_1") == small.steps("slow_2") == ALL


def test_an_unknown_partition_is_a_mistake_that_creates_nothing(cluster: Cluster, tmp_path: Path):
    small = Small(tmp_path, "quick")
    for more in ((), ("--dry-run",)):
        ended = small.run(*SLURM, "--launcher-option=partition=nope", *more)
        assert ended.status == 2 and ended.err.count("\n") == 1
        assert "nvalid partition" in ended.err and not small.folder.exists()


def test_a_real_run_whose_time_is_up_is_requeued_and_resumes_without_its_runner(
    cluster: Cluster, tmp_path: Path
):
    body = '    yield {"name": "top_2", "moe.gate.name": "top_k"}\n'
    text = runs.write_text(tmp_path / "text")
    page = write_page(tmp_path, text, body, train__steps=200, train__eval_every=200)
    words = [f"--experiment={page}", f"--workdir={tmp_path / 'out'}", *SLURM]
    # Eight devices, as other tests have, would meet at every one of many steps.
    environment = {**caching(), "JAX_NUM_CPU_DEVICES": "1"}
    run = {
        "cwd": ROOT,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    command = [sys.executable, "-m", "moejax", "sweep", *words]
    workdir = tmp_path / "out/trials/top_2-seed0"
    rows = workdir / "metrics.jsonl"

    with subprocess.Popen(command, **run) as process:
        try:
            wait_until(lambda: rows.exists() and rows.read_text(), seconds=240)
        finally:
            process.kill()
    (number,) = cluster.jobs("%i", "--states=RUNNING")
    cluster.ask("scancel", "--batch", "--signal=USR2", number)
    ended = subprocess.run(command, timeout=400, **run)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "top_2-seed0 is still running, started by a runner that was killed" in ended.stdout
    log = (workdir / "log.txt").read_text()
    assert log.count("stopping after this step and saving") == 1
    assert f"SLURM job {number} starts again, 1 of 100 times" in log
    steps = [row["step"] for row in map(json.loads, rows.read_text().splitlines())
             if row["split"] == "train"]  # fmt: skip
    assert steps == sorted(set(steps)) and steps[-1] == 200
    wait_until(lambda: not cluster.jobs())
