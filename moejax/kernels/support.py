"""Facts about the kernels for their callers: platforms, varying mesh axes, forward mode's error.

Each is about a limit of a kernel: where it runs, what `jax.shard_map` may check about it, and what
JAX can differentiate through it.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import jax
from jaxtyping import PyTree

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
    """True if `grouped_matmul` may be used in ``jax.shard_map(..., check_vma=True)``.

    False on TPU and GPU: the Pallas kernels used there (megablox, tokamax) declare output shapes
    without the mesh axes they vary over, which `pallas_call` refuses when the check is on.
    `ragged_exchange` passes the check on every platform.
    """
    return resolve_platform(platform) not in _PALLAS_PLATFORMS


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which at least one array varies.

    Empty outside `jax.shard_map` and when it runs with ``check_vma=False``.
    """
    return frozenset().union(*(_axes_of(array) for array in arrays))


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The array, declared to vary over `axes` besides those it varies over already.

    Values do not change. The transpose sums over the axes added here, so the gradient of a
    replicated operand is complete on every device.
    """
    missing = tuple(sorted(axes - _axes_of(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def match_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each declared to vary over every axis that one of them varies over.

    A custom_vjp wants this of its operands: it returns cotangents of the operands' own types.
    """
    axes = varying_axes(*arrays)
    return tuple(vary_over(array, axes) for array in arrays)


def varying_like(tree: PyTree, *arrays: jax.Array) -> PyTree:
    """The tree, every leaf declared to vary where the arrays do: how a loop's carry must start."""
    axes = varying_axes(*arrays)
    return jax.tree.map(lambda leaf: vary_over(leaf, axes), tree)


def _axes_of(array: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(array).manual_axis_type.varying)


@contextlib.contextmanager
def forward_mode_refused(instead: str) -> Iterator[None]:
    """JAX's TypeError about forward mode through a custom_vjp, replaced by one with the remedy.

    It is raised where the layer is called, unless a `jax.jit` lies between: then JAX's own is.
    """
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "forward-mode differentiation (jax.jvp, jacfwd, linearize) cannot pass the kernels of "
            f"this layer, which have a backward pass only; use {instead}, reverse mode (jax.grad, "
            "vjp, jacrev), forward over reverse (jax.jvp of jax.grad) or finite differences"
        ) from error
