"""Helpers for values that vary over the manual axes of a `jax.shard_map`."""

import jax
from jaxtyping import PyTree


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
