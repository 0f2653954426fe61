"""Which implementation a kernel uses, and what `jax.shard_map` may check about it."""

from typing import Literal

import jax

from moejax.errors import UserError

Platform = Literal["cpu", "tpu", "gpu"]
PLATFORMS: tuple[str, ...] = ("cpu", "tpu", "gpu")

_PALLAS_PLATFORMS = ("tpu", "gpu")


class MissingKernelError(UserError, RuntimeError):
    """The platform's kernel is in a package that is not installed."""


def resolve_platform(platform: str | None) -> Platform:
    """The given platform, or that of JAX's default backend.

    The choice is made while tracing, not by `jax.lax.platform_dependent` while lowering: that
    traces the branch of every platform, which would import the GPU package on a TPU and fail under
    ``check_vma=True`` on a CPU (see `kernels_pass_check_vma`). Name the platform where a program is
    compiled for devices that are not the default backend's.
    """
    if platform is None:
        platform = jax.default_backend()
    if platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r}: expected one of {', '.join(PLATFORMS)}")
    return platform  # type: ignore[return-value]  # a str that was just found in PLATFORMS


def kernels_pass_check_vma(platform: str | None = None) -> bool:
    """Whether `grouped_matmul` may be used in ``jax.shard_map(..., check_vma=True)``.

    False on TPU and GPU: the Pallas kernels used there (megablox, tokamax) declare output shapes
    without the mesh axes they vary over, which `pallas_call` refuses when the check is on.
    `ragged_exchange` passes the check on every platform.
    """
    return resolve_platform(platform) not in _PALLAS_PLATFORMS
