"""Memory in bytes, from abstract values: nothing is allocated and nothing is compiled."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from moejax.train.cost.flops import num_shards


def residual_bytes(f: Callable[..., Any], *abstract_args: Any) -> int:
    """Bytes of the residuals that ``f``'s forward pass computes for its backward pass.

    These are the activations: arguments that the backward pass also reads (weights, inputs) do not
    count, because they are in memory anyway. Shapes are global; under a mesh, divide by the number
    of shards of the activations. XLA may keep less, by recomputing cheap values inside a fusion.

    Args:
      f: a differentiable function of arrays; ``jax.checkpoint`` inside it takes effect.
      abstract_args: ``jax.ShapeDtypeStruct`` trees or arrays.
    """
    kept, _ = forward_bytes(f, *abstract_args)
    return kept


def forward_bytes(f: Callable[..., Any], *abstract_args: Any, devices: int = 1) -> tuple[int, int]:
    """``residual_bytes``, and the bytes of the largest matrix product on one device.

    The result of a product exists as a whole for a moment, even if it is recomputed later: for
    ordinary attention, the scores of all pairs of tokens. Shapes outside a shard_map are divided by
    ``devices``, which is a lower bound.
    """
    counts: list[int] = []

    def trace(*args: Any) -> Any:
        arguments = {id(leaf) for leaf in jax.tree.leaves(args)}
        out, backward = jax.vjp(f, *args)
        kept = {id(x): x for x in jax.tree.leaves(backward) if id(x) not in arguments}
        counts.append(sum(x.size * x.dtype.itemsize for x in kept.values()))
        return out

    program = jax.make_jaxpr(trace)(*abstract_args)
    return counts[0], _largest_product(program.jaxpr, devices)


def product_bytes(f: Callable[..., Any], *abstract_args: Any, devices: int = 1) -> int:
    """Bytes of the largest matrix product of ``f`` on one device; see `forward_bytes`."""
    return _largest_product(jax.make_jaxpr(f)(*abstract_args).jaxpr, devices)


def _largest_product(jaxpr: Jaxpr, devices: int) -> int:
    largest = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            out: Any = eqn.outvars[0].aval
            largest = max(largest, out.size * out.dtype.itemsize // devices)
        shards = num_shards(eqn.params) if eqn.primitive.name == "shard_map" else 1
        for body in jaxprs_in_params(eqn.params):
            largest = max(largest, _largest_product(body, max(1, devices // shards)))
    return largest


def tree_bytes_per_device(abstract_tree: Any) -> int:
    """Bytes of a tree on one device, the fullest one if shards are uneven.

    Leaves are arrays or ``jax.ShapeDtypeStruct``; one without a sharding counts in full.
    """

    def leaf_bytes(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize  # in Python's integers, which do not overflow

    return sum(map(leaf_bytes, jax.tree.leaves(abstract_tree)))
