"""Starts what a config asks for before JAX does: virtual CPU devices, several processes."""

import contextlib
import math
import os
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

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
        with _waiting(distributed.num_processes, f"process 0 at {distributed.coordinator}"):
            jax.distributed.initialize(
                distributed.coordinator, distributed.num_processes, distributed.process_id
            )
        return distributed.num_processes
    launched = _launched_processes()
    if distributed.mode == "off" or launched == 1:
        return 1
    try:
        with warnings.catch_warnings(), _waiting(launched, "distributed.mode=auto"):
            # In a plain pod, without the client that a JobSet would need: not a cluster for us.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize(num_processes=launched)
    except ValueError:  # JAX found no launcher that it knows
        _check_no_other_launcher()
        if launched:
            print("moejax: none has been launched: one process goes on alone", file=sys.stderr)
        return 1
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"distributed.mode=auto found a launcher but could not join its processes ({reason}); "
            "use distributed.mode=off for one process or explicit with coordinator, num_processes "
            "and process_id"
        ) from error
    return launched or 1


WAIT = 300.0
"""Seconds until processes that do not come are given up."""


@contextlib.contextmanager
def _waiting(processes: int | None, found: str) -> Iterator[None]:
    """Inside, JAX waits for the other processes of the run: says for how many, and until when.

    When its own time is up JAX ends the process with SIGABRT and a stack of C++, which nothing in
    Python can catch; so the wait ends shortly before that, in one line and with exit status 2.

    Raises:
      UserError: processes that were named one by one cannot be joined.
    """
    if processes is None:  # a launcher that knows, and starts them all
        yield
        return
    what = f"{processes} processes ({found})"

    def give_up() -> None:
        print(
            f"moejax: error: waited {WAIT:.0f} s for {what}, and not all have come; start them "
            "all, or use distributed.mode=off for one process alone",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    print(f"moejax: waiting for all of {what}, {WAIT:.0f} s at most", file=sys.stderr, flush=True)
    timer = threading.Timer(WAIT, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _launched_processes() -> int | None:
    """How many processes Open MPI or SLURM started together; None if neither did.

    The innermost launcher counts: mpirun inside an allocation of SLURM, and of SLURM the step. An
    interactive step has one task, whatever the job has.
    """
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        count = os.environ.get(variable, "")
        if count.isdecimal():
            return int(count)
    return None


def _check_no_other_launcher() -> None:
    """Refuses to be one of several processes that know nothing of each other.

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
from moejax.devices import started_devices
from moejax.errors import UserError
try:
    started_devices()
except UserError as error:
    sys.exit(str(error))
"""


def check_for_children() -> None:
    """Asks, for processes that this one will start, whether the devices that the environment names
    are there. Another process starts them and ends: this one must not hold them.

    Raises:
      UserError: they are not.
    """
    if {os.environ.get(name, "") for name in _PLATFORM} <= {"", "cpu"}:
        return
    done = subprocess.run([sys.executable, "-c", _STARTS], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise UserError(last[0])


def memory_of(device: jax.Device, sharing: int) -> int | None:
    """Bytes that a device has for arrays; None where its driver does not say.

    Virtual CPU devices have the host's memory together: ``sharing`` of them.
    """
    if device.platform == "cpu":
        return host_memory() // sharing
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int:
    """Bytes of memory that this process may take: the host's, or less where a container, a batch
    system or ``ulimit -v`` allows less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()]
    of_process, _ = resource.getrlimit(resource.RLIMIT_AS)
    if of_process != resource.RLIM_INFINITY:
        limits.append(of_process)
    return min(limits)


def _cgroup_limits(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[int]:
    """The limits of the control groups that this process is in, and of those above them."""
    try:
        lines = Path(proc).read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):  # version 2 has none in its name
            continue
        base, name = Path(root), "memory.max"
        if controllers:
            base, name = base / "memory", "memory.limit_in_bytes"
        # Inside a container the path may be the host's, of which only the root is there.
        group = base / place.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                found += _limit(folder / name)
    return found


def _limit(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() else []  # "max": none


def need_no_accelerator() -> None:
    """For what only counts: the host will do, also where the accelerator that the environment asks
    for is absent, or another process has it."""
    if not backend_is_running():
        jax.config.update("jax_platforms", "cpu")


def started_devices() -> list[jax.Device]:
    """All devices; JAX starts them now, if it has not yet.

    Raises:
      UserError: what the environment asks for is not there, or cannot be used.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of CUDA without its plugin
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        asked = f"JAX_PLATFORMS={platforms}" if platforms else ""
        if name := os.environ.get("JAX_PLATFORM_NAME"):
            asked = asked or f"JAX_PLATFORM_NAME={name}"
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "no plugin of JAX is installed"
        reason = " ".join(reason.split())
        if not asked:
            raise UserError(f"JAX cannot start its devices: {reason}") from error
        raise UserError(
            f"{asked}: there is no such device here ({reason}); unset it, set it to "
            "cpu, or install the extra for it (pip install 'moejax[gpu]' or 'moejax[tpu]')"
        ) from error
