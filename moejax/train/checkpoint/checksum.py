"""Checksums of arrays that do not depend on the arrays' sharding.

The checksum of an array is two sums modulo 2**32 over its words ``v_i`` (the bits of element ``i``
in row-major order as an unsigned integer; elements of 8 bytes are two words)::

    sum_s = sum_i mix(v_i XOR mix(i) XOR s)        s = two fixed seeds

with ``mix`` the 32-bit finalizer of MurmurHash3. Addition modulo 2**32 is exact and associative, so
the order of the sum does not matter: every device adds up its own block and one psum finishes.

Detected errors. ``mix`` is a bijection of the 32-bit integers, so a change of one word, hence any
single flipped bit, changes exactly one term of each sum and therefore always changes both sums.
A change of several words is missed with probability about 2**-64. (The simpler weighted sum
``sum_i w_i * v_i`` with odd ``w_i`` also detects every single bit, but no pair of flipped sign
bits: ``2**31 * w_i + 2**31 * w_j`` is 0 modulo 2**32.) It does not protect against an adversary.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SEEDS = (0x9E3779B9, 0x7F4A7C15)
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class Checksums(NamedTuple):
    of: dict[str, str]  # name -> 16 hexadecimal digits
    diverged: list[str]  # names of arrays of which two devices hold different copies


def checksums(arrays: Mapping[str, jax.Array]) -> Checksums:
    """The checksum of every array, and the names of arrays with copies that differ.

    If several devices hold a block, the checksum is that of the first copy, and the sum over all
    copies shows whether they are equal (they can diverge through a hardware fault, or if each is
    computed by a kernel that is not deterministic).

    One compiled program and one small transfer for all arrays on the same mesh. In a job of several
    processes every process calls this with the same names and gets the same answer. Dtypes: bool,
    integers and floats of 8 to 64 bits (of typed PRNG keys pass the key data); any other is a
    TypeError. An empty array has the checksum 0.
    """
    groups: dict[object, list[str]] = {}
    specs: dict[str, PartitionSpec] = {}
    for name, x in arrays.items():
        devices = x.sharding
        if isinstance(devices, NamedSharding):
            devices, specs[name] = devices.mesh, devices.spec
        groups.setdefault(devices, []).append(name)
    digests, diverged = {}, []
    for devices, names in groups.items():
        values = [arrays[name] for name in names]
        if isinstance(devices, Mesh):
            sums = _mesh_sums(devices, tuple(specs[name] for name in names))(values)
        else:
            sums = _global_sums(values)
        for name, (one, two, differ) in zip(names, np.asarray(sums).tolist(), strict=True):
            digests[name] = digest((one, two))
            if differ:
                diverged.append(name)
    return Checksums(digests, diverged)


def block_sums(block: np.ndarray, start: list[np.uint32], shape: tuple[int, ...]) -> np.ndarray:
    """uint32[2]: the two sums over a block that begins at `start` in an array of `shape`.

    Added up modulo 2**32 over blocks that cover the array, they are the array's (see `digest`).
    """
    return np.asarray(_sums(block, start, shape))


def digest(sums: Sequence[int] | np.ndarray) -> str:
    """The checksum for an array's two sums: 16 hexadecimal digits."""
    return "".join(f"{int(value):08x}" for value in sums)


def _mix(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32 with one more axis, the words of an element."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)[..., None]
    number = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    if not number or x.dtype.itemsize not in _WORDS:
        raise TypeError(f"no checksum for arrays of dtype {x.dtype}")
    words = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    return words if x.dtype.itemsize == 8 else words[..., None]


@functools.partial(jax.jit, static_argnums=2)  # traced once per shape, however many arrays have it
def _sums(x: jax.Array, start: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """uint32[2]: the two sums over the block `x` that begins at `start` in an array of `shape`."""
    words = _words(x)
    index = lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    for axis, first in enumerate(start):
        stride = math.prod(shape[axis + 1 :]) * words.shape[-1]
        position = lax.broadcasted_iota(jnp.uint32, words.shape, axis) + first
        index += position * jnp.uint32(stride % 2**32)
    # Both sums in one reduction: one pass over memory and half the compile time of two.
    mixed = words ^ _mix(index)
    terms = tuple(_mix(mixed ^ jnp.uint32(seed)) for seed in _SEEDS)
    zero = jnp.uint32(0)
    axes = tuple(range(words.ndim))
    return jnp.stack(lax.reduce(terms, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes))


@jax.jit
def _global_sums(arrays: list[jax.Array]) -> jax.Array:
    """uint32[N, 3] for arrays without a mesh: the two sums and 0."""
    sums = [_sums(x, [jnp.uint32(0)] * x.ndim, x.shape) for x in arrays]
    return jnp.pad(jnp.stack(sums), ((0, 0), (0, 1)))


@functools.cache
def _mesh_sums(mesh: Mesh, specs: tuple[PartitionSpec, ...]):
    """A compiled function: arrays laid out by `specs` over `mesh` -> replicated uint32[N, 3].

    The two sums over the first copies, and 1 if the sum over all copies is no multiple of them.
    """
    copies = [math.prod(mesh.shape[name] for name in _unused(mesh, spec)) for spec in specs]

    def sums(arrays: list[jax.Array]) -> jax.Array:
        blocks = [_block_sums(x, spec, mesh) for x, spec in zip(arrays, specs, strict=True)]
        first, every = jnp.unstack(lax.psum(jnp.stack(blocks, axis=1), mesh.axis_names))
        differ = (first * jnp.array(copies, jnp.uint32)[:, None] != every).any(axis=1)
        return jnp.concatenate([first, differ[:, None].astype(jnp.uint32)], axis=1)

    return jax.jit(
        jax.shard_map(sums, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec())
    )


def _block_sums(x: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """uint32[2, 2]: the sums of this device's block, zero unless it is the first copy; the sums."""
    split = _axes(spec, x.ndim)
    start = [
        jnp.uint32(lax.axis_index(names) * size if names else 0)
        for names, size in zip(split, x.shape, strict=True)
    ]
    counts = [math.prod(mesh.shape[name] for name in names) for names in split]
    shape = tuple(size * count for size, count in zip(x.shape, counts, strict=True))
    sums = _sums(x, start, shape)
    copy = sum(lax.axis_index(name) for name in _unused(mesh, spec))
    return jnp.stack([jnp.where(copy == 0, sums, jnp.uint32(0)), sums])


def _axes(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array."""
    split = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    return split + [()] * (ndim - len(split))


def _unused(mesh: Mesh, spec: PartitionSpec) -> list[str]:
    """The mesh axes along which devices hold copies."""
    used = {name for names in _axes(spec, 0) for name in names}
    return [name for name in mesh.axis_names if name not in used]
