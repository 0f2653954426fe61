"""JAX settings that results depend on: a run fixes them, whatever the environment says.

JAX takes them from environment variables (``JAX_DEFAULT_PRNG_IMPL``) and from ``jax.config``, and
nothing records them. Settings that change the meaning of a program are fixed here or are a field of
the config; variables that change its compilation are recorded in config.json.
"""

import enum
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax

from moejax.config.tree import Config

FIXED: dict[str, Any] = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_threefry_gpu_kernel_lowering": False,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_enable_x64": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_softmax_custom_jvp": False,
    "jax_allow_f16_reductions": True,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_custom_vjp3": False,
    "jax_remat3": False,
    "jax_scan3": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_transfer_guard_host_to_device": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_transfer_guard": None,  # sets all three
}
"""JAX's own defaults, by name: random numbers, element types, rules for combining arrays; then
settings under which a run would not be traced, compiled and executed as written (debugging
switches, and unfinished parts of JAX)."""

PRECISION = "jax_default_matmul_precision"
"""The setting for ``model.matmul_precision``."""

_PREFIXES = ("JAX_", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "FLAX_", "NVIDIA_TF32_OVERRIDE", "CUBLAS_",
             "CUDNN_", "TF_CUDNN_", "OMP_NUM_THREADS")  # fmt: skip
_IRRELEVANT = ("JAX_PLATFORM", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_LOG",
                  "JAX_DUMP", "JAX_ENABLE_COMPILATION_CACHE", "JAX_NUM_CPU_DEVICES",
                  "JAX_TRACEBACK", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE_IDS", "JAX_NUM_PROCESSES",
                  "JAX_PROCESS_")  # fmt: skip
"""Beginnings of names of variables that JAX reads and that change no number of a run."""


def fix(config: Config | None = None) -> None:
    """Fixes the settings of this process; warns about each that had another value.

    Call it before anything is traced. Without a config, matmuls have the platform's precision.
    """
    wanted = FIXED | {PRECISION: _precision(config)}
    for name, value in wanted.items():
        if not hasattr(jax.config, name):  # a setting of another version of JAX
            continue
        present = getattr(jax.config, name)
        present = present.name.lower() if isinstance(present, enum.Enum) else present
        if present == value:
            continue
        remedy = "; set model.matmul_precision" if name == PRECISION else ""
        print(
            f"moejax: warning: {name.upper()}={present} has no effect: a run always has "
            f"{'the default' if value is None else value}{remedy}",
            file=sys.stderr,
        )
        jax.config.update(name, value)


def _precision(config: Config | None) -> str | None:
    chosen = config.model.matmul_precision if config is not None else "default"
    return None if chosen == "default" else chosen


def environment() -> dict[str, str]:
    """The environment variables that are set and may change the rounding of a run's programs."""
    fixed = {name.upper() for name in (*FIXED, PRECISION)}
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES) and not name.startswith(_IRRELEVANT) and name not in fixed
    }


def warn_of_changes(saved: Mapping[str, Any]) -> None:
    """Prints a line for each variable that had another value when this config.json was written."""
    if "environment" not in saved:  # a run older than this entry
        return
    before, now = saved["environment"], environment()
    for name in sorted(before | now):
        if before.get(name, "") != now.get(name, ""):
            print(
                f"moejax: warning: {name}={now.get(name, '')!r} here and {before.get(name, '')!r} "
                "when the run was started; programs may be compiled differently and numbers "
                "rounded differently",
                file=sys.stderr,
            )
