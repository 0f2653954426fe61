"""Two processes of four devices each train what one process of eight trains."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.probe import Probe

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    "mesh.data": 2,
    "mesh.expert": 4,
    "moe.capacity_factor": 1.0,
    "train.steps": 5,
    "train.batch_size": 8,
    "train.seq_len": 32,
    "train.log_every": 1,
    "train.eval_every": 5,
    "train.eval_rows": 8,
    "train.checkpoint_every": 5,
}

LATE = """
import functools, sys, time
from moejax.train import setup

inner = setup.Run.train_step.func
def late(self):  # as if this process compiled for longer
    time.sleep(35)
    return inner(self)
setup.Run.train_step = functools.cached_property(late)
setup.Run.train_step.__set_name__(setup.Run, "train_step")

from moejax.cli import main
sys.exit(main())
"""
"""The command line, in a process that is late for its first step."""


PREEMPTED_AT_2 = """
import functools, os, signal, sys, time
from moejax.train import setup

inner = setup.Run.train_step.func
def slow(self):
    update = inner(self)
    def step(state, batch):
        if int(state.step) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # for the notice to reach the other process before the last step
        return update(state, batch)
    return step
setup.Run.train_step = functools.cached_property(slow)
setup.Run.train_step.__set_name__(setup.Run, "train_step")

from moejax.cli import main
sys.exit(main())
"""
"""The command line, in a process that gets SIGTERM before its second step."""


def flags(**more):
    return [f"--config.{name}={value}" for name, value in {**OVERRIDES, **more}.items()]


def start(*arguments, program=("-m", "moejax")):
    """A process of the command line with as many CPU devices as its config asks for."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, status=0):
    """What they print, once all have ended so; on a failure none is left behind."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output[-3000:]
    return outputs


def train_in_two(config, workdir, last_program=("-m", "moejax"), status=0, **more):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        start(
            "train", config, f"--workdir={workdir}", *flags(**more),
            "--config.distributed.mode=explicit", "--config.distributed.num_processes=2",
            f"--config.distributed.coordinator=localhost:{port}",
            f"--config.distributed.process_id={rank}", program=program,
        )
        for rank, program in enumerate([("-m", "moejax"), last_program])
    ]  # fmt: skip
    return finish(*processes, status=status)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "text.py").write_bytes(Path(argparse.__file__).read_bytes())
    return folder


def text(folder):
    return {"data.path": folder / "text.py"}


CONFIG = "--config=configs/lm.py:size=debug"


@pytest.fixture(scope="module")
def two(folder):
    """A finished run of two processes."""
    outputs = train_in_two(CONFIG, folder / "two", **text(folder))
    assert "held-out loss" in outputs[0] and "held-out loss" not in outputs[1]
    return folder / "two"


FLOATS = {
    "loss", "total_loss", "grad_norm", "learning_rate", "bits_per_byte", "moe/router_entropy",
    "aux/load_balance", "aux/z", "aux/importance", "aux/load",
}  # fmt: skip


def close(got, wanted):
    """Rows of the same run: losses to 1e-5, everything that is counted exactly."""
    assert [(r["step"], r["split"]) for r in got] == [(r["step"], r["split"]) for r in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name not in FLOATS:
                assert one[name] == other[name], (one["step"], name)
            else:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5)


def same_routing(workdir, other):
    """The probes of two runs: routing exactly, what was computed of it to 1e-4 after five steps."""
    found, wanted = Probe.read(workdir), Probe.read(other)
    assert found is not None and wanted is not None and not found.problems
    assert found.steps == wanted.steps == [0, 5]
    for got, want in [
        (found.tokens, wanted.tokens),
        *((found.at(s), wanted.at(s)) for s in (0, 5)),
    ]:
        assert set(got) == set(want)
        for name, x in want.items():
            if x.dtype.kind == "f":
                np.testing.assert_allclose(got[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_two_processes_train_what_one_trains(two, folder):
    finish(start("train", CONFIG, f"--workdir={folder / 'one'}", *flags(**text(folder))))
    close(rows(two), rows(folder / "one"))
    same_routing(two, folder / "one")
    train = [row for row in rows(two) if row["split"] == "train"]
    assert len(train) == 5 and all(np.sum(row["moe/dropped"]) > 0 for row in train)


def test_one_process_evaluates_the_checkpoint_of_two_on_another_mesh(two):
    mesh = ("--config.mesh.data=1", "--config.mesh.expert=2")
    (output,) = finish(start("eval", f"--workdir={two}", *mesh))
    close([json.loads(output.splitlines()[-1])], [rows(two)[-1]])


def test_a_process_that_compiles_for_longer_is_waited_for(folder):
    """The other one would otherwise give up its first collective after 30 seconds."""
    late = {"moe.transport": "gather", "mesh.data": 1, "mesh.expert": 8, "train.steps": 2}
    train_in_two(CONFIG, folder / "late", ("-c", LATE), **text(folder), **late)
    assert [row["step"] for row in rows(folder / "late")] == [1, 2, 2]


def test_a_notice_to_one_process_stops_both_and_the_same_command_ends_bit_equal(two, folder):
    workdir = folder / "preempted"
    program = ("-c", PREEMPTED_AT_2)
    outputs = train_in_two(CONFIG, workdir, program, status=75, **text(folder))
    (stopped,) = re.findall(r"stopped and saved at step (\d);", outputs[0])
    assert 2 <= int(stopped) < 5
    outputs = train_in_two(CONFIG, workdir, **text(folder))
    assert f"resuming {workdir} at step {stopped}" in outputs[0]
    assert (workdir / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    for path in (two / "probe").iterdir():
        assert (workdir / "probe" / path.name).read_bytes() == path.read_bytes()
