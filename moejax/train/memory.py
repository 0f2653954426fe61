"""Bytes, from abstract values: nothing is allocated and nothing is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def residual_bytes(f: Callable[..., Any], *abstract_args: Any) -> int:
    """Bytes that ``f``'s forward pass computes and keeps for its backward pass.

    These are the activations: arguments that the backward pass also reads (weights, inputs) are not
    counted, because they are alive anyway. Shapes are global; under a mesh, divide by the number of
    shards of the activations. XLA may keep less, by recomputing cheap values inside a fusion.

    Args:
      f: a differentiable function of arrays; ``jax.checkpoint`` inside it has its effect.
      abstract_args: ``jax.ShapeDtypeStruct`` trees or arrays.
    """
    counts: list[int] = []

    def trace(*args: Any) -> Any:
        arguments = {id(leaf) for leaf in jax.tree.leaves(args)}
        out, backward = jax.vjp(f, *args)
        kept = {id(x): x for x in jax.tree.leaves(backward) if id(x) not in arguments}
        counts.append(sum(x.size * x.dtype.itemsize for x in kept.values()))
        return out

    jax.eval_shape(trace, *abstract_args)
    return counts[0]


def tree_bytes_per_device(abstract_tree: Any) -> int:
    """Bytes that a tree takes on one device, the fullest where shards are uneven.

    Leaves are arrays or ``jax.ShapeDtypeStruct``; one without a sharding counts in full.
    """

    def leaf_bytes(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize

    return sum(map(leaf_bytes, jax.tree.leaves(abstract_tree)))
