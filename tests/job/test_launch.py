"""Devices and processes are set up before JAX starts, and not changed afterwards."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax import cli
from moejax.config import default
from moejax.errors import UserError
from moejax.job import launch, memory
from moejax.job.launch import backend_is_running, configure_devices

ROOT = Path(__file__).parents[2]


def test_running_devices_are_left_unchanged(eight_devices: list[jax.Device]):
    assert backend_is_running()
    config = default()
    config.mesh.cpu_devices = 3
    configure_devices(config)
    assert jax.devices() == eight_devices


def test_more_virtual_devices_than_a_process_can_start_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "backend_is_running", lambda: False)
    config = default()
    config.mesh.data, config.mesh.expert = 513, 2
    with pytest.raises(UserError, match=r"mesh\.data=513 .* needs 1026 devices .* at most 1024"):
        configure_devices(config)


@pytest.mark.usefixtures("eight_devices")
def test_joining_processes_after_the_devices_started_is_refused():
    config = default()
    config.distributed.mode = "explicit"
    with pytest.raises(UserError, match="comes too late"):
        configure_devices(config)


LAUNCHED = {
    "nothing": ({}, None),
    "SLURM": ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4),
    "a batch script of SLURM": ({"SLURM_NTASKS": "4"}, 4),
    "an interactive step": ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, 1),
    "a step of some tasks": ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}, 2),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    "mpirun in an allocation": (
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_SIZE": "1"},
        1,
    ),
    "a word": ({"SLURM_NTASKS": "four"}, None),
}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_the_innermost_launcher_sets_the_number_of_processes(launcher, monkeypatch):
    variables, expected = LAUNCHED[launcher]
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch._launched_processes() == expected


def test_processes_of_a_launcher_that_jax_does_not_know_are_refused(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(
        UserError, match=r"PMI_SIZE=4, .* num_processes=4 and process_id=\$PMI_RANK"
    ):
        launch._check_no_other_launcher()
    monkeypatch.setenv("PMI_SIZE", "1")
    launch._check_no_other_launcher()


ALONE = """
import sys
from moejax.config import default
from moejax.errors import UserError
from moejax.job import launch, rendezvous
rendezvous.START, rendezvous.QUIET = 1.0, 0.3
config = default()
config.distributed.mode = "explicit"
config.distributed.coordinator = "127.0.0.1:{port}"
config.distributed.num_processes, config.distributed.process_id = 2, {rank}
try:
    launch.configure_devices(config)
except UserError as error:
    print(f"moejax: error: {{error}}", file=sys.stderr, flush=True)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_processes_is_reported_at_once_and_ends_with_one_line(rank):
    """JAX would abort with a stack of C++, minutes later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = ALONE.format(port=port, rank=rank)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("moejax")]
    late = ("waits for process 1 at", "waits for process 0 to listen at")[rank]
    assert lines[0] == f"moejax: process {rank} {late} 127.0.0.1:{port}"
    what = ("process 1 of 2 did not come to", "process 1 did not find process 0 at")[rank]
    assert f"error: {what} distributed.coordinator=127.0.0.1:{port}" in lines[-1]
    assert "stack trace" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.quick(1)
@pytest.mark.parametrize("platform", ["cuda", "gpux"])
def test_an_absent_accelerator_is_reported_in_one_line(platform, tmp_path):
    """The doctor, which lists the devices, reports it too; and no folder is made."""
    if platform == "cuda" and importlib.util.find_spec("jax_plugins"):
        pytest.skip("this installation has the plugin")
    env = os.environ | {"JAX_PLATFORMS": platform}
    code = (
        "import sys; from moejax import cli\n"
        "assert cli.main(['config']) == 0\n"
        "codes = [cli.main(['doctor']), cli.main(['train', '--config=configs/lm.py:size=debug', "
        "'--workdir=' + sys.argv[1]]), cli.main(['profile', '--config=configs/lm.py:size=debug', "
        "'--out=' + sys.argv[1]])]\n"
        "assert codes == [2, 2, 2], codes"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "new")], capture_output=True, text=True,
        cwd=ROOT, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("moejax: error:")]
    assert len(errors) == 3 and not (tmp_path / "new").exists()
    for line in errors:
        assert f"JAX_PLATFORMS={platform}: there is no such device here" in line
        assert "moejax[gpu]" in line
    assert "devices            none: moejax cannot train here" in done.stdout


@pytest.mark.slow
def test_a_sweep_checks_its_devices_before_it_creates_anything(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "gpux")
    monkeypatch.setattr("moejax.sweep.runner.make_workdir", pytest.fail)  # no trial is begun
    line = ["sweep", f"--experiment={ROOT}/experiments/gating", f"--workdir={tmp_path}/new"]
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("moejax: error: JAX_PLATFORMS=gpux: there is no such device here")
    assert said.count("\n") == 1 and not (tmp_path / "new").exists()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    launch.check_for_children()


def test_a_list_of_gates_needs_no_accelerator():
    env = os.environ | {"JAX_PLATFORMS": "gpux", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    command = [sys.executable, "-m", "moejax", "gates", "switch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def groups(tmp_path: Path, lines: str, limits: dict[str, str]) -> list[int]:
    """The limits found in a tree of control groups of these files."""
    for name, text in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "self").write_text(lines)
    return memory._cgroup_limits(str(tmp_path / "self"), str(tmp_path / "cgroup"))


def test_limits_of_control_groups_up_to_the_root_count(tmp_path: Path):
    two = {"memory.max": "900", "job/memory.max": "max", "job/step/memory.max": "300"}
    assert groups(tmp_path / "2", "0::/job/step\n", two) == [300, 900]
    one = {"memory/job/memory.limit_in_bytes": "500", "cpu/job/memory.limit_in_bytes": "1"}
    assert groups(tmp_path / "1", "4:memory:/job\n3:cpu:/job\n", one) == [500]
    assert groups(tmp_path / "container", "0::/of/the/host\n", {"memory.max": "700"}) == [700]
    assert groups(tmp_path / "none", "0::/\n", {}) == []


def test_host_memory_respects_the_limits_of_this_process(monkeypatch):
    whole = memory.host_memory()
    assert 2**20 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: [2**40, 2**20])
    assert memory.host_memory() == 2**20
    assert memory.memory_of(jax.devices()[0], sharing=4) == 2**18


FRESH = """
import sys
from moejax.config import default, validate
from moejax.job.launch import configure_devices
from moejax.job.launch import backend_is_running
config = default()
config.mesh.expert = 4
validate(config)
configure_devices(config)
assert not backend_is_running()
import jax
assert jax.device_count() == 4, jax.devices()
heavy = {"grain", "orbax", "matplotlib", "tokenizers", "tensorboardX"} & set(sys.modules)
assert not heavy, heavy
"""


def test_fresh_process_gets_the_meshs_devices_and_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
