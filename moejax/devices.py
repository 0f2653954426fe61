"""Starts what a config asks for before JAX does: virtual CPU devices, several processes."""

import math
import os
import warnings

import jax

from moejax import settings
from moejax.errors import UserError
from moejax.mesh import AXES, resolve_shape
from moejax.schema import Config

CPU_DEVICES = "jax_num_cpu_devices"


def configure_devices(config: Config) -> None:
    """Fixes JAX's settings, joins the run's processes, sets the number of virtual CPU devices.

    Call once, after ``validate`` and before anything touches a device: JAX fixes both when its
    first backend starts. Where that has happened already (in a notebook, a test) the devices stay
    as they are. Starts no backend itself.

    Under SLURM and Open MPI, JAX gives each process the one GPU of its local rank; set
    ``JAX_LOCAL_DEVICE_IDS`` for another layout.

    Raises:
      UserError: processes that cannot be joined, or a mesh that does not divide over them.
    """
    settings.fix(config)
    if backend_is_running():
        if config.distributed.mode == "explicit" and not jax.distributed.is_initialized():
            raise UserError(
                "distributed.mode=explicit comes too late: JAX has started its devices; join the "
                "processes before any other use of JAX"
            )
        return
    processes = _join(config)
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


def _join(config: Config) -> int:
    """Joins the processes as ``distributed.mode`` says; how many there are."""
    distributed = config.distributed
    if distributed.mode == "explicit":
        jax.distributed.initialize(
            distributed.coordinator, distributed.num_processes, distributed.process_id
        )
        return distributed.num_processes
    launched = _launched_processes()
    if distributed.mode == "off" or launched == 1:
        return 1
    try:
        with warnings.catch_warnings():
            # In a plain pod, without the client that a JobSet would need: not a cluster for us.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize()
    except ValueError:  # JAX found no launcher that it knows
        return 1
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"distributed.mode=auto found a launcher but could not join its processes ({reason}); "
            "use distributed.mode=off for one process or explicit with coordinator, num_processes "
            "and process_id"
        ) from error
    return launched or 1


def _launched_processes() -> int | None:
    """How many processes SLURM or Open MPI started together; None if neither did."""
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        count = os.environ.get(variable, "")
        if count.isdecimal():
            return int(count)
    return None
