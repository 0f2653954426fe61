"""Sending slices of unequal length between the devices of a mesh axis.

`ragged_exchange` has the semantics of `jax.lax.ragged_all_to_all`, which it is on TPU and GPU.
XLA:CPU does not implement that collective (jax issue 34755), so on CPU every device gathers all
operands and looks up the rows sent to it. The arguments, and so the offset arithmetic of the
caller, are the same everywhere.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from moejax.kernels.support import Platform, resolve_platform, vary_over, varying_axes


def ragged_exchange(
    operand_ND: Num[Array, "N ..."],
    output_MD: Num[Array, "M ..."],
    input_offsets: Int[Array, "slices"],
    send_sizes: Int[Array, "slices"],
    output_offsets: Int[Array, "slices"],
    recv_sizes: Int[Array, "slices"],
    *,
    axis_name: str,
    platform: str | None = None,
) -> Num[Array, "M ..."]:
    """Sends slices of rows to every device of `axis_name` and receives theirs into a buffer.

    To be called inside `jax.shard_map`. With S devices on the axis and n slices per peer every
    vector has S n entries; entry i concerns peer i // n. In units of rows:

    * ``operand[input_offsets[i] : input_offsets[i] + send_sizes[i]]`` goes to peer i // n;
    * there it is written from row ``output_offsets[i]`` of *that peer's* buffer: output offsets are
      the sender's knowledge;
    * ``recv_sizes[i]`` rows arrive from peer i // n as its slice i % n for this device, so
      recv_sizes equals ``jax.lax.all_to_all(send_sizes, axis_name, 0, 0, tiled=True)``.

    Returns:
      `output_MD` with the received rows written into it. Rows that are not sent keep the value of
      `output_MD`, whatever it is.

    Slices received by one device must not overlap. On CPU a call that breaks a rule (sizes of the
    two sides differ, a slice leaves a buffer, received slices overlap) fills the result with NaN,
    or with the least integer; the other platforms do not look.

    Gradient: with respect to `operand_ND` only, by the reverse exchange, for slices that do not
    overlap in the operand either; rows that are not sent have gradient zero. `output_MD` counts as
    a constant: its gradient is zero.

    Raises:
      ValueError: the vectors differ in length or do not divide among the devices, or the buffers
        differ in dtype or row shape.
    """
    vectors = (input_offsets, send_sizes, output_offsets, recv_sizes)
    _check_operands(operand_ND, output_MD, vectors, jax.lax.axis_size(axis_name))
    output_MD = jax.lax.stop_gradient(output_MD)
    axes = varying_axes(operand_ND, output_MD, *vectors)
    axes |= {axis_name}
    vectors = tuple(vary_over(vector.astype(jnp.int32), axes) for vector in vectors)
    static = _Static(axis_name, resolve_platform(platform), operand_ND.shape[0])
    return _exchange(static, vary_over(operand_ND, axes), vary_over(output_MD, axes), vectors)


def _check_operands(operand, output, vectors, num_devices: int) -> None:
    if operand.shape[1:] != output.shape[1:] or operand.dtype != output.dtype:
        raise ValueError(
            "ragged_exchange: operand and output differ in row shape or dtype: "
            f"{operand.dtype}{operand.shape} and {output.dtype}{output.shape}"
        )
    shapes = {vector.shape for vector in vectors}
    if len(shapes) != 1 or vectors[0].ndim != 1 or vectors[0].shape[0] % num_devices:
        raise ValueError(
            "ragged_exchange: offsets and sizes must be vectors of one length, a multiple of the "
            f"{num_devices} devices on the axis; got {[vector.shape for vector in vectors]}"
        )


class _Static(NamedTuple):
    axis_name: str
    platform: Platform
    operand_rows: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static: _Static, operand, output, vectors):
    return _send(static, operand, output, vectors)


def _send(static: _Static, operand, output, vectors):
    """Plain, for the backward pass too, so that forward mode may pass it: jvp of grad."""
    if static.platform == "cpu":
        return _exchange_by_lookup(operand, output, vectors, static.axis_name)
    return jax.lax.ragged_all_to_all(operand, output, *vectors, axis_name=static.axis_name)


def _exchange_fwd(static: _Static, operand, output, vectors):
    return _send(static, operand, output, vectors), vectors


def _exchange_bwd(static: _Static, vectors, cotangent):
    """Every received slice goes back to where it came from."""
    input_offsets, send_sizes, output_offsets, recv_sizes = vectors
    zeros = jnp.zeros((static.operand_rows, *cotangent.shape[1:]), cotangent.dtype)
    zeros = vary_over(zeros, varying_axes(cotangent))
    here_at, there_at = (
        _swap_with_peers(offsets, static.axis_name) for offsets in (output_offsets, input_offsets)
    )
    reverse = _Static(static.axis_name, static.platform, cotangent.shape[0])
    d_operand = _send(reverse, cotangent, zeros, (here_at, recv_sizes, there_at, send_sizes))
    no_gradient = tuple(np.zeros(vector.shape, jax.dtypes.float0) for vector in vectors)
    return d_operand, jnp.zeros_like(cotangent), no_gradient


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _swap_with_peers(vector: jax.Array, axis_name: str) -> jax.Array:
    """Entry i of peer p's vector comes to entry (p n + i % n) of the device i // n it concerns."""
    return jax.lax.all_to_all(vector, axis_name, 0, 0, tiled=True)


def _exchange_by_lookup(operand, output, vectors, axis_name: str) -> jax.Array:
    """The exchange by gathering every operand: each output row finds the row sent to it."""
    input_offsets, send_sizes, output_offsets, recv_sizes = vectors
    sent_sizes = _swap_with_peers(send_sizes, axis_name)
    source_start = _swap_with_peers(input_offsets, axis_name)
    target_start = _swap_with_peers(output_offsets, axis_name)
    num_rows, num_slices = output.shape[0], recv_sizes.shape[0]
    peer = jnp.arange(num_slices) // (num_slices // jax.lax.axis_size(axis_name))

    # Empty slices sort behind all rows, so that they hide no other slice.
    order = jnp.argsort(jnp.where(recv_sizes > 0, target_start, num_rows))
    start, size = target_start[order], recv_sizes[order]
    row = jnp.arange(num_rows)
    sort_key = jnp.where(size > 0, start, num_rows)
    slot = jnp.maximum(jnp.searchsorted(sort_key, row, side="right") - 1, 0)
    offset = row - start[slot]
    received = (offset >= 0) & (offset < size[slot])

    source_row = jnp.where(received, source_start[order][slot] + offset, 0)
    gathered = jax.lax.all_gather(operand, axis_name, axis=0, tiled=True)
    gathered_row = peer[order][slot] * operand.shape[0] + source_row
    rows = jnp.take(gathered, gathered_row, axis=0, mode="clip")
    result = jnp.where(_per_row(received, output), rows, output)

    legal = (
        jnp.all(sent_sizes == recv_sizes)
        & jnp.all(recv_sizes >= 0)
        & _slices_fit(source_start, recv_sizes, operand.shape[0])
        & _slices_fit(target_start, recv_sizes, num_rows)
        & (jnp.sum(received) == jnp.sum(recv_sizes))  # fewer where slices overlap
    )
    return jnp.where(legal, result, _poison(output.dtype))


def _slices_fit(start, size, num_rows: int):
    return jnp.all((size == 0) | ((start >= 0) & (start + size <= num_rows)))


def _per_row(mask, rows):
    return mask.reshape(mask.shape + (1,) * (rows.ndim - 1))


def _poison(dtype):
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.array(jnp.nan, dtype)
    return jnp.array(jnp.iinfo(dtype).min, dtype)
