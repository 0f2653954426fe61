"""The training state as one pytree, and the sharding of its arrays."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from moejax.train.parameters import STACKED, in_gate, path_names, split_name

AnyMesh = Mesh | AbstractMesh
"""An abstract mesh has sizes without devices, which is enough for the shapes of shards."""

AXIS_OF = {"E": "expert", "D": "fsdp", "F": "tensor", "H": "tensor", "J": "tensor"}
"""Mesh axis of a weight's axis, by the letter in its name: ``up_EDF`` is (expert, fsdp, tensor)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to resume: saved as a whole, restored bit for bit.

    ``step`` counts completed updates; it is also the position in the data. ``params`` is a nested
    dict of float32 arrays, ``key`` the raw data of the run's PRNG key.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    gate_state: PyTree
    key: Array


def partition_spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The split of the array at ``path``, from the axis letters at the end of its name.

    Vectors and gates' weights are small and stay whole, and so does an array without axis letters
    (step counts) or with axes that do not divide over their mesh axis. An optimizer keeps its state
    of a parameter below the parameter's path, or at it.
    """
    names = path_names(path)
    letters = split_name(names[-1])[1] if names else ""
    lead = 1 if STACKED in names else 0
    if len(letters) + lead != len(shape) or len(letters) < 2 or in_gate(names):
        return PartitionSpec()
    axes: list[str | None] = [None] * lead
    for letter, size in zip(letters, shape[lead:], strict=True):
        axis = AXIS_OF.get(letter)
        axes.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*axes)


def shardings(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, partition_spec(path, x.shape, mesh)), tree
    )


def abstract(tree: PyTree, mesh: AnyMesh) -> PyTree:
    """ShapeDtypeStructs with shardings, which checkpoints are restored onto."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def count_parameters(params: PyTree) -> int:
    """Number of scalars in the tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
