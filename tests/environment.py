"""Environments of the processes that tests start."""

import atexit
import functools
import os
import shutil
import tempfile

OURS = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
"""Variables that conftest.py sets so that tests compile fast, on eight devices."""


@functools.cache
def cache() -> str:
    """The cache folder of the processes that this session of tests starts."""
    folder = tempfile.mkdtemp(prefix="moejax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def caching() -> dict[str, str]:
    """This environment, with compiled programs kept, as they are for a user.

    For processes that run the same programs one after another: a sweep's trials, a resumed run.
    """
    return {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": cache()}


def of_a_user() -> dict[str, str]:
    """Without the flags of the tests: one device and optimised programs, which are kept."""
    return {name: value for name, value in caching().items() if name not in OURS}
