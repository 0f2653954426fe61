"""Starts what a config asks for before JAX does: virtual CPU devices, several processes."""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import clusters, distributed, xla_bridge
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

from moejax import job as jobs
from moejax.errors import UserError
from moejax.job import connect as connection
from moejax.mesh import AXES, resolve_shape
from moejax.overrides import apply_overrides, take_overrides
from moejax.schema import Config, default
from moejax.sources import read
from moejax.validate import check_distributed

CPU_DEVICES = "jax_num_cpu_devices"


def join_processes(config: Config) -> int:
    """Joins the run's processes as ``distributed.mode`` says; how many there are.

    Does nothing the second time. Starts no device.

    Raises:
      UserError: processes that cannot be joined.
    """
    job = jobs.current()
    if job is not None:
        return job.place.processes
    explicit = config.distributed.mode == "explicit"
    if jax.distributed.is_initialized():
        raise UserError(
            "JAX's processes are joined already, without the connection that moejax's keep; leave "
            "the call of jax.distributed.initialize to moejax (distributed.mode)"
        )
    if backend_is_running():
        if explicit:
            raise UserError(
                "distributed.mode=explicit comes too late: JAX has started its devices; join the "
                "processes before any other use of JAX"
            )
        return 1
    place = _place(config)
    if place is None:
        return 1
    _start_jax(jobs.join(place))
    return place.processes


def configure_devices(config: Config) -> None:
    """Joins the run's processes and sets the number of virtual CPU devices.

    Call once, after ``validate`` and before anything touches a device: JAX fixes both when its
    first backend starts. Where that has happened already (in a notebook, a test) the devices stay
    as they are. Starts no backend itself.

    Under SLURM and Open MPI, JAX gives each process the one GPU of its local rank; set
    ``JAX_LOCAL_DEVICE_IDS`` for another layout.

    Raises:
      UserError: processes that cannot be joined, or a mesh that does not divide over them.
    """
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
    jax.config.update(CPU_DEVICES, devices)


def backend_is_running() -> bool:
    """Whether JAX has started devices; asking does not start them."""
    # The public sign of it: from then on the number of CPU devices cannot be changed.
    devices = getattr(jax.config, CPU_DEVICES)
    try:
        jax.config.update(CPU_DEVICES, devices + 1)
    except RuntimeError:
        return True
    jax.config.update(CPU_DEVICES, devices)
    return False


def _place(config: Config) -> jobs.Place | None:
    """This process's place among the others; None for a process alone.

    Raises:
      UserError: a launcher that does not tell, or a coordinator that is no host.
    """
    given = config.distributed
    if given.mode == "explicit":
        found = given.coordinator, given.num_processes, given.process_id
    else:
        launched = _launched_processes()
        found = None if given.mode == "off" or launched == 1 else _launchers_place()
    if found is None or found[1] == 1:
        return None
    coordinator, processes, process = found
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    if process == 0:
        bind = bind or jobs.resolved(coordinator)
    return jobs.Place(coordinator, processes, process, bind)


def _launchers_place() -> tuple[str, int, int] | None:
    """Coordinator, number of processes and process by a launcher that JAX knows; None without.

    Where the launcher has put all processes on one machine they meet on its loopback interface.
    """
    start = int(connection.START)
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        with warnings.catch_warnings():
            # In a plain pod, without the client that a JobSet would need: not a cluster for us.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
            coordinator, processes, process, _ = detect(given, None, None, None, None, start)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"distributed.mode=auto found a launcher but could not join its processes ({reason}); "
            "use distributed.mode=off for one process or explicit with coordinator, num_processes "
            "and process_id"
        ) from error
    if coordinator is None or processes is None or process is None:
        return None
    if not given and _all_here(processes):
        coordinator = f"127.0.0.1:{coordinator.rpartition(':')[2]}"
    return coordinator, processes, process


def _all_here(processes: int) -> bool:
    """Whether SLURM or Open MPI say that they started all processes on this machine."""
    return os.environ.get("SLURM_STEP_NUM_NODES") == "1" or (
        os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(processes)
    )


def _start_jax(job: jobs.Job) -> None:
    """Joins JAX's processes, whose coordinator listens where process 0 did.

    Raises:
      UserError: the port has been taken meanwhile.
    """
    # JAX's preemption service would take SIGTERM from our own handler, and knows no other signal.
    jax.config.update("jax_enable_preemption_service", False)
    place = job.place
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            coordinator_bind_address=place.bind or None,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"JAX could not join the processes at distributed.coordinator={place.coordinator} "
            f"({reason}); name a free port"
        ) from error
    if jax.config.values["jax_cpu_collectives_implementation"] == "gloo":
        # It would listen on what the machine's name stands for, also when all processes meet on
        # the loopback interface.
        xla_bridge.register_backend_factory(
            "cpu", functools.partial(_cpu_client, job.address), priority=0, fail_quietly=False
        )


def _cpu_client(address: str) -> Any:
    client = distributed.global_state.client
    gloo = _jax.make_gloo_tcp_collectives(distributed_client=client, hostname=address)
    return xla_bridge.make_cpu_client(gloo)


def _launched_processes() -> int | None:
    """How many processes SLURM or Open MPI started together; None if neither did."""
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        count = os.environ.get(variable, "")
        if count.isdecimal():
            return int(count)
    return None


def place_of_command(argv: Sequence[str]) -> jobs.Place | None:
    """This process's place among others, from a command line that may be wrong otherwise.

    None for a process alone, and where even that cannot be read.
    """
    try:
        overrides, rest = take_overrides(argv)
        own = [flag for flag in overrides if flag.startswith("--config.distributed.")]
        words = [word for flag in rest for word in flag.split("=", 1)]
        source = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
        config = _readable(source, own)
        check_distributed(config)
        return _place(config)
    except UserError:
        return None


def _readable(source: str, overrides: Sequence[str]) -> Config:
    """The page's config, or the defaults where it cannot be read, with these overrides."""
    config = default()
    if source:
        with contextlib.suppress(UserError):
            config = read(source)
    apply_overrides(config, overrides)
    return config
