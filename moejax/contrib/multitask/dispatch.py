"""Experts shared by several gates: the outputs for each example, weighted once per gate."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moejax import mesh as meshes
from moejax.dispatch import exchange
from moejax.dispatch.api import check_divides, site_on
from moejax.experts import activate
from moejax.types import Site


class SharedExperts(NamedTuple):
    """Small FFNs with biases, stacked; O is the width of their output."""

    in_EDF: Float[Array, "E D F"]
    shift_EF: Float[Array, "E F"]
    out_EFO: Float[Array, "E F O"]
    shift_EO: Float[Array, "E O"]


def multi_gate(
    x_BD: Float[Array, "B D"],
    weight_BME: Float[Array, "B M E"],
    experts: SharedExperts,
    activation: str,
) -> Float[Array, "B M O"]:
    r"""Every gate's weighted sum of all experts' outputs: y_m = sum_e weight_{m,e} f_e(x).

    Each expert runs once on every example, whatever the gates choose: with M gates of k experts
    each, most experts are used by some gate. Under ``jax.set_mesh`` examples are sharded over
    (data, fsdp, expert) and experts over ``expert``: examples are gathered over ``expert``, each
    shard sums its own experts for all gates, and the sums are reduce-scattered back. ``tensor`` is
    not used. The result does not depend on the sharding.

    Raises:
      ValueError: experts that do not divide over the mesh.
    """
    mesh = meshes.ambient()
    check_divides(mesh, len(experts.in_EDF))
    return _multi_gate(x_BD, weight_BME, experts, activation=activation, mesh=mesh)


@partial(jax.jit, static_argnames=("activation", "mesh"))
def _multi_gate(
    x_BD: Array, weight_BME: Array, experts: SharedExperts, *, activation: str, mesh: Any
) -> Array:
    run = partial(_on_shard, activation=activation, site=site_on(mesh))
    if mesh is None:
        return run((x_BD, weight_BME), experts)
    on_shards = meshes.on_batch_shards(run, mesh, (_expert_spec(mesh),))
    return on_shards((x_BD, weight_BME), experts)


def _on_shard(
    examples: tuple[Array, Array], experts: SharedExperts, *, activation: str, site: Site
) -> Array:
    x_bD, weight_bME = examples
    x_BD = exchange.gather_tokens(x_bD, site)
    # Each shard needs the weights of its own experts only, for the examples of all shards.
    batch, gates, _ = weight_bME.shape
    by_owner = weight_bME.reshape(batch, gates, site.shards, -1)
    sent_SXe = jnp.moveaxis(by_owner, 2, 0).reshape(site.shards, batch * gates, -1)
    weight_BMe = exchange.swap_shards(sent_SXe, site).reshape(len(x_BD), gates, -1)
    with jax.named_scope("experts"):
        out_BeO = run_experts(x_BD, experts, activation)
    with jax.named_scope("unpack"):
        y_BMO = jnp.einsum("bme,beo->bmo", weight_BMe.astype(out_BeO.dtype), out_BeO)
    return exchange.scatter_sum(y_BMO, site)


def run_experts(
    x_BD: Float[Array, "B D"], experts: SharedExperts, activation: str
) -> Float[Array, "B E O"]:
    """Every expert on every example."""
    experts = jax.tree.map(lambda w: w.astype(x_BD.dtype), experts)
    hidden_BEF = jnp.einsum("bd,edf->bef", x_BD, experts.in_EDF) + experts.shift_EF
    hidden_BEF = activate(activation, None, hidden_BEF)
    return jnp.einsum("bef,efo->beo", hidden_BEF, experts.out_EFO) + experts.shift_EO


def _expert_spec(mesh: AbstractMesh) -> P:
    return P("expert" if meshes.axes_in(mesh, ("expert",)) else None)
