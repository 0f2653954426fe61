"""A module's parameters as nested dicts of arrays, and back."""

from typing import Any

from flax import nnx
from jaxtyping import Array, PyTree


def to_tree(state: PyTree) -> dict[str, Any]:
    """A module's ``nnx.State`` as nested dicts of arrays with string keys."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = variable[...]
    return tree


def from_tree(template: PyTree, tree: PyTree) -> PyTree:
    """The inverse of ``to_tree``; ``template`` gives the structure."""

    def find(path: tuple[Any, ...]) -> Array:
        node = tree
        for part in path:
            node = node[str(part)]
        return node

    return nnx.from_flat_state(
        [(path, variable.replace(find(path))) for path, variable in nnx.to_flat_state(template)]
    )
