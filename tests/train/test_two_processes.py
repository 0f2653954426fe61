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

from moejax.record.probe import Probe

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


STOPPED_AT_2 = """
import functools, os, pathlib, signal, sys, time
from moejax.train import setup

def listening():
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
           if os.path.islink(f"/proc/self/fd/{fd}")}
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in own:
                print("listens at", table, address.split(":")[0], flush=True)

inner = setup.Run.train_step.func
def slow(self):
    update = inner(self)
    def step(state, batch):
        if int(state.step) == 1:
            listening()
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # for the request to reach the other process before the last step
        return update(state, batch)
    return step
setup.Run.train_step = functools.cached_property(slow)
setup.Run.train_step.__set_name__(setup.Run, "train_step")

from moejax.cli import main
sys.exit(main())
"""
"""As above, in a process that lists its listeners and gets SIGINT before its second step."""


def flags(**more):
    return [f"--config.{name}={value}" for name, value in {**OVERRIDES, **more}.items()]


def start(*arguments, program=("-m", "moejax"), cwd=ROOT, **variables):
    """A process of the command line with as many CPU devices as its config asks for."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, status=0):
    """The output of the processes, once all have ended so; on a failure none is left running."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output[-3000:]
    return outputs


def start_two(config, workdir, programs=(("-m", "moejax"),) * 2, differing=({}, {}), **more):
    """Both processes; ``differing`` are keyword arguments of their own, with ``flags`` among them.

    Everything is on the loopback interface.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank, own in enumerate(differing):
        own = dict(own)
        place = {
            "mode": "explicit", "num_processes": 2, "process_id": rank,
            "coordinator": f"localhost:{port}",
        }  # fmt: skip
        settings = {**more, **{f"distributed.{k}": v for k, v in place.items()}}
        words = flags(**{**settings, **own.pop("flags", {})})
        argv = ["train", config, f"--workdir={workdir}", *words]
        processes.append(start(*argv, program=programs[rank], **own))
    return processes


def train_in_two(config, workdir, last_program=("-m", "moejax"), status=0, **more):
    programs = (("-m", "moejax"), last_program)
    return finish(*start_two(config, workdir, programs, **more), status=status)


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


def test_two_processes_train_the_same_as_one(two, folder):
    finish(start("train", CONFIG, f"--workdir={folder / 'one'}", *flags(**text(folder))))
    close(rows(two), rows(folder / "one"))
    same_routing(two, folder / "one")
    train = [row for row in rows(two) if row["split"] == "train"]
    assert len(train) == 5 and all(np.sum(row["moe/dropped"]) > 0 for row in train)


def test_one_process_evaluates_the_checkpoint_of_two_on_another_mesh(two):
    mesh = ("--config.mesh.data=1", "--config.mesh.expert=2")
    (output,) = finish(start("eval", f"--workdir={two}", *mesh))
    close([json.loads(output.splitlines()[-1])], [rows(two)[-1]])


def test_a_process_that_compiles_longer_is_waited_for(folder):
    """The other one would otherwise give up its first collective after 30 seconds."""
    late = {"moe.transport": "gather", "mesh.data": 1, "mesh.expert": 8, "train.steps": 2}
    train_in_two(CONFIG, folder / "late", ("-c", LATE), **text(folder), **late)
    assert [row["step"] for row in rows(folder / "late")] == [1, 2, 2]


def test_ctrl_c_to_one_process_stops_both_and_the_same_command_ends_bit_equal(two, folder):
    """Meanwhile nothing listens anywhere but on the loopback interface."""
    workdir = folder / "preempted"
    program = ("-c", STOPPED_AT_2)
    outputs = train_in_two(CONFIG, workdir, program, status=75, **text(folder))
    (stopped,) = re.findall(r"stopped and saved at step (\d);", outputs[0])
    assert 2 <= int(stopped) < 5
    assert "process 1 got SIGINT: stopping after this step and saving" in outputs[0]
    heard = re.findall(r"listens at (\w+) (\w+)", outputs[1])
    assert heard and {kind for kind, _ in heard} == {"tcp"}
    assert {address for _, address in heard} == {"0100007F"}, "127.0.0.1, the last byte first"
    outputs = train_in_two(CONFIG, workdir, **text(folder))
    assert f"resuming {workdir} at step {stopped}" in outputs[0]
    assert (workdir / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    for path in (two / "probe").iterdir():
        assert (workdir / "probe" / path.name).read_bytes() == path.read_bytes()


# ---------------------------------------------------------------- what is refused before step 0


DIFFERENCES = {
    "optim.learning_rate": (0.001, 0.002),
    "train.eval_every": (2, 3),
    "train.batch_size": (8, 16),
    "mesh.data": (2, 1),
}


def errors(outputs):
    """Each process's lines that say what is wrong."""
    return [[x for x in out.splitlines() if x.startswith("moejax: error:")] for out in outputs]


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_differing_value_is_reported_in_every_process_with_both_values(field, tmp_path, folder):
    values = DIFFERENCES[field]
    differing = [{"flags": {field: value}} for value in values]
    said = errors(
        finish(*start_two(CONFIG, tmp_path / "run", differing=differing, **text(folder)), status=2)
    )
    line = f"{field} is {values[0]} in process 0 and {values[1]} in process 1"
    assert [len(lines) for lines in said] == [1, 1]
    assert all(line in lines[0] for lines in said), said
    assert not list(tmp_path.iterdir())


def test_a_differing_jax_setting_is_reported_in_every_process(tmp_path, folder):
    differing = ({}, {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"})
    said = errors(
        finish(*start_two(CONFIG, tmp_path / "run", differing=differing, **text(folder)), status=2)
    )
    assert all("jax_default_matmul_precision is" in lines[0] for lines in said), said


def test_a_workdir_that_processes_do_not_share_is_refused_and_not_created(tmp_path, folder):
    """The same relative name, from two folders."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    differing = [{"cwd": place} for place in places]
    config = f"--config={ROOT}/configs/lm.py:size=debug"
    said = errors(
        finish(*start_two(config, "runs/x", differing=differing, **text(folder)), status=2)
    )
    for lines in said:
        assert len(lines) == 1 and "in process 0 and" in lines[0] and "share" in lines[0], said
        assert all(str(place) in lines[0] for place in places)
    assert not any(list(place.iterdir()) for place in places)


@pytest.mark.parametrize("mistake", [{"data.path": "/nowhere"}, {"train.stepz": 3}])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_in_one_process_is_reported_in_the_other(rank, mistake, tmp_path):
    differing = [{"flags": mistake if process == rank else {}} for process in range(2)]
    said = errors(finish(*start_two(CONFIG, tmp_path / "run", differing=differing), status=2))
    (name,) = mistake
    for lines in said:
        assert len(lines) == 1 and lines[0].startswith(f"moejax: error: process {rank}: {name}")
    assert not list(tmp_path.iterdir())


def test_processes_that_a_launcher_started_on_this_machine_meet_on_its_loopback(tmp_path):
    """Open MPI's variables; the address that it names is of no machine here."""
    processes = [
        start(
            "train", CONFIG, f"--workdir={tmp_path / 'run'}", *flags(**{"train.seed": rank}),
            OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://192.0.2.1,192.0.2.2:34911",
            OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = errors(finish(*processes, status=2))
    assert [len(lines) for lines in said] == [1, 1]
    assert all("train.seed is 0 in process 0 and 1 in process 1" in x[0] for x in said)
