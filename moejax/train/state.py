"""The training state as one pytree, and where its arrays lie on a mesh."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from moejax.train.parameters import STACKED, in_gate

AXIS_OF = {"E": "expert", "D": "fsdp", "F": "tensor", "H": "tensor", "J": "tensor"}
"""Mesh axis of a weight's axis, by the letter in its name: ``up_EDF`` is (expert, fsdp, tensor)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on: saved as a whole, restored bit for bit.

    ``step`` counts completed updates; it is also the position in the data. ``params`` is a nested
    dict of float32 arrays, ``key`` the raw data of the run's PRNG key.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    gate_state: PyTree
    key: Array


def partition_spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the array at ``path`` is split, read off the axis letters at the end of its name.

    Vectors and gates' weights are small and stay whole, as does whatever has no axis letters (step
    counts) or does not divide over its mesh axis. An optimizer keeps what it knows of a parameter
    below the parameter's path, or at it.
    """
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
    stem, _, letters = names[-1].rpartition("_") if names else ("", "", "")
    lead = 1 if STACKED in names else 0
    if not stem or len(letters) + lead != len(shape) or len(letters) < 2 or in_gate(names):
        return PartitionSpec()
    axes: list[str | None] = [None] * lead
    for letter, size in zip(letters, shape[lead:], strict=True):
        axis = AXIS_OF.get(letter)
        axes.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*axes)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, partition_spec(path, x.shape, mesh)), tree
    )


def abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def count_parameters(params: PyTree) -> int:
    """Number of scalars in the tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
