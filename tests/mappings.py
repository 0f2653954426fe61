"""The memory mappings of this process, and a limit on those of compiled programs."""

import gc
from pathlib import Path

import jax

MOST = 30_000
"""Every program of XLA:CPU maps memory, and a process may have 65530 mappings (vm.max_map_count):
the slow suite alone would compile more than fit, and XLA then dies with a segmentation fault."""


def forget_programs_if_many() -> None:
    """Free all compiled programs where they have become many, or where that is not known.

    Until then tests share what all of them compile, such as operations on arrays.
    """
    try:
        count = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        count = MOST + 1
    if count > MOST:
        jax.clear_caches()
        gc.collect()
