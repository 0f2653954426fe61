"""Starting the processes and devices that a config asks for, before JAX starts its own."""

import contextlib
import functools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import clusters, distributed, xla_bridge
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

from moejax import job as jobs
from moejax.config import settings
from moejax.config.checks import check_distributed
from moejax.config.field import CPU_DEVICES as MAX_CPU_DEVICES
from moejax.config.overrides import apply_overrides, take_overrides
from moejax.config.sources import read
from moejax.config.tree import Config, default
from moejax.errors import UserError
from moejax.job import rendezvous
from moejax.mesh import AXES, resolve_shape

CPU_DEVICES = "jax_num_cpu_devices"


def join_processes(config: Config) -> int:
    """Joins the run's processes as ``distributed.mode`` says; returns their number.

    Does nothing the second time. Starts no device.

    Raises:
      UserError: processes that cannot be joined.
    """
    job = jobs.current()
    if job is not None:
        return job.spec.processes
    explicit = config.distributed.mode == "explicit"
    if jax.distributed.is_initialized():
        raise UserError(
            "JAX's processes are joined already, without moejax's own connection between them; "
            "leave the call of jax.distributed.initialize to moejax (distributed.mode)"
        )
    if backend_is_running():
        if explicit:
            raise UserError(
                "distributed.mode=explicit comes too late: JAX has started its devices; join the "
                "processes before any other use of JAX"
            )
        return 1
    spec = _job_spec(config)
    if spec is None:
        return 1
    _start_jax(jobs.join(spec))
    return spec.processes


def configure_devices(config: Config) -> None:
    """Fixes JAX's settings, joins the run's processes, sets the number of virtual CPU devices.

    Call once, after ``validate`` and before anything uses a device: JAX fixes both when its first
    backend starts. If that has happened already (in a notebook, a test) the devices stay as they
    are. Starts no backend itself.

    Under SLURM and Open MPI, JAX gives each process the one GPU of its local rank; set
    ``JAX_LOCAL_DEVICE_IDS`` for another layout.

    Raises:
      UserError: processes that cannot be joined, or a mesh that does not divide over them.
    """
    settings.fix(config)
    processes = join_processes(config)
    if backend_is_running():
        return
    devices = config.mesh.cpu_devices
    if not devices:
        total = math.prod(resolve_shape({axis: config.mesh[axis] for axis in AXES}).values())
        if total % processes:
            raise UserError(
                f"the mesh's {total} devices do not divide over {processes} processes; change the "
                "mesh or the number of processes"
            )
        devices = total // processes
    if devices > MAX_CPU_DEVICES:  # no process has that many accelerators either
        named = " x ".join(f"mesh.{axis}={config.mesh[axis]}" for axis in AXES)
        raise UserError(
            f"{named} needs {devices} devices per process, and on CPU a process has at most "
            f"{MAX_CPU_DEVICES}; make the mesh smaller"
        )
    jax.config.update(CPU_DEVICES, devices)


def backend_is_running() -> bool:
    """True if JAX has started devices; asking does not start them."""
    # The public sign: from then on the number of CPU devices cannot be changed.
    devices = getattr(jax.config, CPU_DEVICES)
    try:
        jax.config.update(CPU_DEVICES, devices + 1)
    except RuntimeError:
        return True
    jax.config.update(CPU_DEVICES, devices)
    return False


def _job_spec(config: Config) -> jobs.JobSpec | None:
    """The job that this process belongs to; None for a single process.

    Raises:
      UserError: a launcher that gives too little information, or a coordinator that is no host.
    """
    distributed = config.distributed
    if distributed.mode == "explicit":
        job = distributed.coordinator, distributed.num_processes, distributed.process_id
    else:
        launched = _launched_processes()
        job = None if distributed.mode == "off" or launched == 1 else _launched_job(launched)
    if job is None or job[1] == 1:
        return None
    coordinator, processes, process = job
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    if process == 0:
        bind = bind or jobs.resolve_address(coordinator)
    return jobs.JobSpec(coordinator, processes, process, bind)


def _launched_job(launched: int | None) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and process from a launcher that JAX knows; None without.

    If the launcher has put all processes on one machine they meet on its loopback interface.
    """
    start = int(rendezvous.START)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        with warnings.catch_warnings():
            # In a plain pod, without the client that a JobSet would need: no cluster to join.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
            coordinator, processes, process, _ = detect(address, launched, None, None, None, start)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"distributed.mode=auto found a launcher but could not join its processes ({reason}); "
            "use distributed.mode=off for one process or explicit with coordinator, num_processes "
            "and process_id"
        ) from error
    if coordinator is None or processes is None or process is None:
        _check_no_other_launcher()
        if launched:
            print("moejax: no other process was launched: running as one", file=sys.stderr)
        return None
    if not address and _all_on_this_machine(processes):
        coordinator = f"127.0.0.1:{coordinator.rpartition(':')[2]}"
    return coordinator, processes, process


def _all_on_this_machine(processes: int) -> bool:
    """True if SLURM or Open MPI report that all processes were started on this machine."""
    return os.environ.get("SLURM_STEP_NUM_NODES") == "1" or (
        os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(processes)
    )


def _start_jax(job: jobs.Job) -> None:
    """Joins JAX's processes; its coordinator listens at the port that process 0 has just freed.

    Raises:
      UserError: the port has been taken meanwhile.
    """
    # JAX's preemption service would take SIGTERM from our own handler, and handles no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    spec = job.spec
    try:
        jax.distributed.initialize(
            spec.coordinator,
            spec.processes,
            spec.process,
            coordinator_bind_address=spec.bind or None,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"JAX could not join the processes at distributed.coordinator={spec.coordinator} "
            f"({reason}); name a free port"
        ) from error
    if jax.config.values["jax_cpu_collectives_implementation"] == "gloo":
        # By default it listens at the address of the machine's name, even if all processes meet on
        # the loopback interface.
        xla_bridge.register_backend_factory(
            "cpu", functools.partial(_cpu_client, job.address), priority=0, fail_quietly=False
        )


def _cpu_client(address: str) -> Any:
    client = distributed.global_state.client
    gloo = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
    return xla_bridge.make_cpu_client(gloo)


def _launched_processes() -> int | None:
    """The number of processes that Open MPI or SLURM started together; None if neither did.

    The innermost launcher counts: mpirun inside an allocation of SLURM, and SLURM's step inside the
    job. An interactive step has one task, whatever the job has.
    """
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        count = os.environ.get(variable, "")
        if count.isdecimal():
            return int(count)
    return None


def _check_no_other_launcher() -> None:
    """Refuses to be one of several processes that are not connected to each other.

    Raises:
      UserError: a launcher that JAX does not know has started several.
    """
    for size, rank in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
                       ("PMI_SIZE", "PMI_RANK"), ("PMIX_SIZE", "PMIX_RANK"),
                       ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK")):  # fmt: skip
        count = os.environ.get(size, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"distributed.mode=auto: {size}={count}, so that many processes were started, by a "
                "launcher that JAX does not know; use distributed.mode=explicit with coordinator, "
                f"num_processes={count} and process_id=${rank}, or distributed.mode=off"
            )


_PLATFORM = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
_STARTS = """
import sys
from moejax.job.launch import started_devices
from moejax.errors import UserError
try:
    started_devices()
except UserError as error:
    sys.exit(str(error))
"""


def check_for_children() -> None:
    """Checks that the devices named by the environment exist, for processes that this one starts.

    Another process starts the devices and ends, since this one must not hold them.

    Raises:
      UserError: they do not exist.
    """
    if {os.environ.get(name, "") for name in _PLATFORM} <= {"", "cpu"}:
        return
    done = subprocess.run([sys.executable, "-c", _STARTS], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise UserError(last[0])


def use_host_only() -> None:
    """Selects the CPU for commands that only count, in case the accelerator named by the
    environment is absent or in use by another process."""
    if not backend_is_running():
        jax.config.update("jax_platforms", "cpu")


def started_devices() -> list[jax.Device]:
    """All devices; JAX starts them now if it has not done so yet.

    Raises:
      UserError: the devices named by the environment do not exist, or cannot be used.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: CUDA without its plugin
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        setting = f"JAX_PLATFORMS={platforms}" if platforms else ""
        if name := os.environ.get("JAX_PLATFORM_NAME"):
            setting = setting or f"JAX_PLATFORM_NAME={name}"
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "no plugin of JAX is installed"
        reason = " ".join(reason.split())
        if not setting:
            raise UserError(f"JAX cannot start its devices: {reason}") from error
        raise UserError(
            f"{setting}: there is no such device here ({reason}); unset it, set it to "
            "cpu, or install the extra for it (pip install 'moejax[gpu]' or 'moejax[tpu]')"
        ) from error


def job_spec_of_command(argv: Sequence[str]) -> jobs.JobSpec | None:
    """The job that this process belongs to, from a command line that may contain other mistakes.

    None for a single process, and if even that cannot be read.
    """
    try:
        overrides, rest = take_overrides(argv)
        own = [flag for flag in overrides if flag.startswith("--config.distributed.")]
        words = [word for flag in rest for word in flag.split("=", 1)]
        source = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
        config = _readable(source, own)
        check_distributed(config)
        return _job_spec(config)
    except UserError:
        return None


def _readable(source: str, overrides: Sequence[str]) -> Config:
    """The page's config, or the defaults if it cannot be read, with these overrides."""
    config = default()
    if source:
        with contextlib.suppress(UserError):
            config = read(source)
    apply_overrides(config, overrides)
    return config
