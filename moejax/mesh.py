"""The device mesh: its axes, how tokens lie on it, and how group-local work runs on it.

Axes: ``data`` (replicas), ``fsdp`` (weights sharded), ``expert`` (experts sharded) and ``tensor``
(heads and hidden widths sharded). Tokens are sharded over the first three jointly; a batch that is
not a multiple of their product costs what the next multiple does. All axes are ``AxisType.Auto``:
outside ``shard_map`` XLA places the work, inside it every axis is manual. Nothing in this module
communicates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from moejax.errors import UserError, suggest

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


def resolve_shape(shape: Mapping[str, int], num_devices: int | None = None) -> dict[str, int]:
    """Fills the one axis that is -1 so that the product equals ``num_devices``.

    Raises:
      UserError: for sizes below 1 (other than one -1) or a product that does not fit.
    """
    sizes = {axis: int(shape.get(axis, 1)) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size} must be at least 1 (or -1 on one axis: fill)")
    if len(free) > 1:
        raise UserError(f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis can fill")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        devices = fixed if num_devices is None else num_devices
        if devices % fixed:
            raise UserError(
                f"mesh.{free[0]}=-1 cannot fill: {devices} devices are not a multiple of the "
                f"other axes' product {fixed}"
            )
        sizes[free[0]] = devices // fixed
    elif num_devices is not None and fixed != num_devices:
        named = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh {named} needs {fixed} devices but there are {num_devices}; change the mesh, set "
            "one axis to -1, or (on CPU) set mesh.cpu_devices"
        )
    return sizes


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all four axes, over ``devices`` (default: all of them).

    Raises:
      UserError: an axis that is none of them, or sizes that do not fit the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    for axis in shape:
        if axis not in AXES:
            raise UserError(f"mesh axis {axis!r} is unknown; {suggest(axis, AXES)}")
    wanted = math.prod(shape.values())
    if wanted > 0 and wanted != len(devices) and all(size > 0 for size in shape.values()):
        named = " x ".join(f"{axis}={size}" for axis, size in shape.items())
        raise UserError(
            f"mesh {named or 'of no axes'} needs {wanted} devices but there are {len(devices)}; "
            "change an axis, set one to -1 (the rest), or pass the devices to use, "
            f"devices=jax.devices()[:{wanted}]"
        )
    sizes = resolve_shape(shape, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def ambient() -> AbstractMesh | None:
    """The mesh entered with ``jax.set_mesh`` if any of its axes is ours, otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    ours = {n: t for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if n in AXES}
    if not ours or AxisType.Manual in ours.values():
        return None
    if AxisType.Explicit in ours.values():
        raise ValueError(
            "moejax needs Auto mesh axes; make the mesh with moejax.mesh.make_mesh or pass "
            "axis_types=(jax.sharding.AxisType.Auto,) * n to jax.make_mesh"
        )
    return mesh


def axes_in(mesh: AbstractMesh | None, names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` along which the mesh splits anything, in the order given.

    An axis of size 1 is left out: XLA keeps a sum over it as a copy of the whole operand.
    """
    if mesh is None:
        return ()
    return tuple(name for name in names if name in mesh.axis_names and mesh.shape[name] > 1)


def axis_size(mesh: AbstractMesh | None, *names: str) -> int:
    """Product of the sizes of the named axes; axes the mesh lacks count 1."""
    return math.prod(mesh.shape[name] for name in axes_in(mesh, names)) if mesh else 1


def batch_spec(mesh: AbstractMesh | None = None) -> PartitionSpec:
    """The layout of an array that leads with sequences or groups."""
    return PartitionSpec(BATCH_AXES if mesh is None else axes_in(mesh, BATCH_AXES))


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """``with_sharding_constraint`` on the ambient mesh; the identity when there is none.

    Axis names the mesh lacks are left out of ``spec``, and so are those over which an axis of ``x``
    does not divide.
    """
    mesh = ambient()
    if mesh is None:
        return x

    def known(entry: Any, size: int) -> Any:
        if entry is None:
            return None
        present = axes_in(mesh, (entry,) if isinstance(entry, str) else entry)
        return present if present and size % axis_size(mesh, *present) == 0 else None

    axes = (known(entry, size) for entry, size in zip(spec, x.shape, strict=False))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def spreads(groups: int) -> bool:
    """True if ``groups`` routing groups divide over the ambient mesh, each on one device."""
    return groups % axis_size(ambient(), *BATCH_AXES) == 0


def on_batch_shards(run: Callable[..., Any], mesh: AbstractMesh, specs: Any, **options: Any) -> Any:
    """``run(tokens, *others)`` in a ``shard_map`` in which tokens are split over the batch axes.

    All arrays of ``tokens`` and of the result lead with sequences or groups; ``specs`` are those of
    the others. Where their number does not divide over the shards, zeros are appended before and
    cut off after: as weights of a routing they send nothing anywhere.
    """
    by_token = batch_spec(mesh)
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(by_token, *specs), out_specs=by_token, **options
    )

    def on_all(tokens: Any, *others: Any) -> Any:
        number = len(jax.tree.leaves(tokens)[0])
        missing = -number % axis_size(mesh, *BATCH_AXES)
        if not missing:
            return mapped(tokens, *others)

        def filled(x: jax.Array) -> jax.Array:
            return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))

        result = mapped(jax.tree.map(filled, tokens), *others)
        return jax.tree.map(lambda x: x[:number], result)

    return on_all


def group_local(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Runs ``fn`` where its groups are: per shard, inside a ``shard_map`` without collectives.

    Every argument and every result leads with the axis G of groups. XLA would all-gather the
    operand of ``top_k`` or ``sort`` on a sharded array; inside ``shard_map`` it cannot. When G does
    not divide over the mesh (one group for the whole batch) the operands are gathered and every
    device does all of it: the same arithmetic, hence the same result, on every mesh.
    """

    def on_groups(*args: Any) -> Any:
        mesh = ambient()
        if mesh is None:
            return fn(*args)
        spec = batch_spec(mesh) if spreads(len(jax.tree.leaves(args)[0])) else PartitionSpec()
        return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)(*args)

    return on_groups
