"""Every collective of the library: tokens between the shards of the ``expert`` mesh axis.

A ``Site`` says where a device-local computation runs. Without a mesh all functions here are the
identity, so transports are written once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.kernels.ragged_exchange import ragged_exchange
from moejax.kernels.support import vary_over, varying_axes
from moejax.types import Site


@jax.named_scope("exchange")
def sum_over_tensor(y: Array, site: Site) -> Array:
    """Adds up the partial sums of a split hidden width."""
    return y if site.tensor_axis is None else jax.lax.psum(y, site.tensor_axis)


@jax.named_scope("exchange")
def swap_shards(cells_SXD: Float[Array, "S X D"], site: Site) -> Float[Array, "S X D"]:
    """Sends block s of the leading axis to shard s; block s of the result came from shard s."""
    if site.expert_axis is None:
        return cells_SXD
    return _received(jax.lax.all_to_all(cells_SXD, site.expert_axis, 0, 0, tiled=True))


@jax.named_scope("exchange")
def gather_tokens(x_t: Array, site: Site) -> Array:
    """All shards' tokens, shard by shard."""
    if site.expert_axis is None:
        return x_t
    return _received(jax.lax.all_gather(x_t, site.expert_axis, axis=0, tiled=True))


@jax.named_scope("exchange")
def scatter_sum(y_T: Array, site: Site) -> Array:
    """Sums over shards and leaves each shard its own tokens: the inverse of ``gather_tokens``."""
    if site.expert_axis is None:
        return y_T
    return jax.lax.psum_scatter(y_T, site.expert_axis, scatter_dimension=0, tiled=True)


def _received(rows: Array) -> Array:
    """Named, so that a recomputation policy can keep it instead of sending it once more."""
    return checkpoint_name(rows, "exchange")


def shard_index(site: Site) -> Array | int:
    """This device's place on the expert axis."""
    return 0 if site.expert_axis is None else jax.lax.axis_index(site.expert_axis)


class Traffic(NamedTuple):
    """Offsets of a ragged exchange there and back, from everyone's counts.

    One slice per (peer, expert): rows arrive sorted by expert, then by sender, and need no second
    sort. Vectors have one entry per peer and expert of that peer (there) or per peer and own expert
    (back); sizes in rows.
    """

    there_input: Int[Array, "E"]
    there_send: Int[Array, "E"]
    there_output: Int[Array, "E"]
    there_receive: Int[Array, "E"]
    back_input: Int[Array, "E"]
    back_output: Int[Array, "E"]
    size_e: Int[Array, "e"]


@jax.named_scope("exchange")
def plan_traffic(size_E: Int[Array, "E"], site: Site) -> Traffic:
    """Exchanges the counts (S x E integers) and derives every offset from them."""
    assert site.expert_axis is not None
    shards, me = site.shards, jax.lax.axis_index(site.expert_axis)
    size_SE = jax.lax.all_gather(size_E, site.expert_axis)
    size_SSe = size_SE.reshape(shards, shards, -1)  # sender, owner, the owner's expert
    start_SE = jnp.cumsum(size_SE, axis=1) - size_SE
    total_Se = jnp.sum(size_SSe, axis=0)
    base_Se = jnp.cumsum(total_Se, axis=1) - total_Se
    offset_SSe = base_Se + jnp.cumsum(size_SSe, axis=0) - size_SSe
    start_SSe = start_SE.reshape(size_SSe.shape)
    traffic = Traffic(
        there_input=start_SE[me],
        there_send=size_E,
        there_output=offset_SSe[me].reshape(-1),
        there_receive=size_SSe[:, me].reshape(-1),
        back_input=offset_SSe[:, me].reshape(-1),
        back_output=start_SSe[:, me].reshape(-1),
        size_e=total_Se[me],
    )
    return checkpoint_name(traffic, "routing")


@jax.named_scope("exchange")
def send_rows(rows_ND: Array, traffic: Traffic, capacity: int, site: Site) -> Array:
    """Rows to the owners of their experts; ``capacity`` bounds what one owner can receive."""
    assert site.expert_axis is not None
    received = ragged_exchange(
        rows_ND,
        buffer_like(rows_ND, capacity),
        traffic.there_input,
        traffic.there_send,
        traffic.there_output,
        traffic.there_receive,
        axis_name=site.expert_axis,
    )
    return _received(received)


@jax.named_scope("exchange")
def return_rows(rows_MD: Array, traffic: Traffic, capacity: int, site: Site) -> Array:
    """The way back of ``send_rows``."""
    assert site.expert_axis is not None
    received = ragged_exchange(
        rows_MD,
        buffer_like(rows_MD, capacity),
        traffic.back_input,
        traffic.there_receive,
        traffic.back_output,
        traffic.there_send,
        axis_name=site.expert_axis,
    )
    return _received(received)


def buffer_like(rows_ND: Array, capacity: int) -> Array:
    """Rows to receive into. Their content means nothing until written (tests fill it with NaN)."""
    empty = jax.lax.empty((capacity, rows_ND.shape[1]), rows_ND.dtype)
    return vary_over(empty, varying_axes(rows_ND))
