"""The memory of a device and of the host, within the limits of this process."""

import os
import resource
from pathlib import Path

import jax


def memory_of(device: jax.Device, sharing: int) -> int | None:
    """Bytes that a device has for arrays; None if its driver does not report them.

    ``sharing`` virtual CPU devices share the host's memory.
    """
    if device.platform == "cpu":
        return host_memory() // sharing
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int:
    """Bytes of memory that this process may use: the host's, or less if a container, a batch system
    or ``ulimit -v`` allows less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        limits.append(limit)
    return min(limits)


def _cgroup_limits(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> list[int]:
    """The limits of the control groups that this process is in, and of those above them."""
    try:
        lines = Path(proc).read_text().splitlines()
    except OSError:  # not Linux
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):  # version 2 names none
            continue
        base, name = Path(root), "memory.max"
        if controllers:
            base, name = base / "memory", "memory.limit_in_bytes"
        # Inside a container the path may be the host's, of which only the root exists.
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                limits += _limit(folder / name)
    return limits


def _limit(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() else []  # "max": none
