"""The manifest of a checkpoint: path, shape, dtype and checksum of every array.

A state is stored as a flat mapping from path ("params/blocks/attention/q") to array, so that
containers (tuples, dataclasses, optax's named tuples) come from the program that restores, never
from the file. A typed PRNG key is stored as its key data (uint32) and wrapped again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moejax.errors import UserError
from moejax.record.files import sealed, unsealed

FORMAT = 1


class Damaged(Exception):
    """A checkpoint whose files are missing, unreadable or differ from what was saved."""


@dataclass(frozen=True)
class Entry:
    """One array: shape and dtype as the program sees them, checksum of the stored bits."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    step: int
    arrays: dict[str, Entry]
    meta: dict[str, Any]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, its parts joined with "/"; numbers and NumPy arrays become JAX arrays."""
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name!r}")
        described = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        leaves[name] = leaf if described else jnp.asarray(leaf)
    return leaves


def is_key(leaf: Any) -> bool:
    """True if `leaf` is a typed PRNG key (an array or its description)."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_array(leaf: Any) -> jax.Array:
    """The array to store for a leaf: the key data of a typed key, otherwise the leaf itself."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def stored_as(leaf: Any) -> jax.ShapeDtypeStruct:
    """Description of the array stored for a described leaf, with the sharding to read it onto.

    A leaf without a sharding goes to the default device.
    """
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def from_array(array: jax.Array, leaf: Any) -> jax.Array:
    """The leaf that `array` was stored for; the inverse of `as_array`."""
    if not is_key(leaf):
        return array
    impl = []
    abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), abstract)
    return jax.random.wrap_key_data(array, impl=impl[0])


def entries(
    leaves: Mapping[str, Any], checksums: Mapping[str, str] | None = None
) -> dict[str, Entry]:
    """Describes leaves, with their checksums if given."""
    known = checksums or {}
    return {
        name: Entry(tuple(leaf.shape), str(leaf.dtype), known.get(name, ""))
        for name, leaf in leaves.items()
    }


def encode(manifest: Manifest) -> dict[str, Any]:
    """A JSON object that carries a digest of itself.

    Raises:
      TypeError: if `meta` holds something that JSON does not.
    """
    arrays = {name: [list(e.shape), e.dtype, e.checksum] for name, e in manifest.arrays.items()}
    return sealed(
        {"format": FORMAT, "step": manifest.step, "arrays": arrays, "meta": manifest.meta}
    )


def decode(stored: Any, step: int) -> Manifest:
    """The manifest of checkpoint `step`.

    Raises:
      Damaged: if it differs from what `encode` made for this step.
      UserError: if a newer version of moejax wrote it.
    """
    if not isinstance(stored, dict):
        raise Damaged("its manifest is not a JSON object")
    body = unsealed(stored)
    if body is None:
        raise Damaged("its manifest does not match its digest")
    if body["format"] != FORMAT:
        raise UserError(
            f"checkpoint {step} has format {body['format']}, this moejax reads {FORMAT}; use the "
            "version that wrote it"
        )
    if body["step"] != step:
        raise Damaged(f"its manifest belongs to step {body['step']}")
    arrays = {
        name: Entry(tuple(shape), dtype, checksum)
        for name, (shape, dtype, checksum) in body["arrays"].items()
    }
    return Manifest(step, arrays, body["meta"])


def check_same_tree(saved: Mapping[str, Entry], wanted: Mapping[str, Entry], what: str) -> None:
    """Compares paths, shapes and dtypes.

    Raises:
      UserError: naming the first path that differs. The checkpoint is intact and describes another
        state, so the config does not fit. (Orbax would cast a dtype without a message.)
    """
    for name in sorted(saved.keys() | wanted.keys()):
        stored, here = saved.get(name), wanted.get(name)
        if str(stored) != str(here):
            raise UserError(
                f"{what} does not fit this config: {name} is {stored or 'absent'} in the "
                f"checkpoint and {here or 'absent'} here; use the config it was saved with or a "
                "new workdir"
            )
