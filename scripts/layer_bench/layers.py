"""The layers that are timed, as functions of (x_TD, params): dense FFNs, ours, and two peers'."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from moejax import gating
from scripts.layer_bench.problems import Params, Shape

Layer = Callable[[jax.Array, Params], jax.Array]


class Impl(NamedTuple):
    """One implementation: how to build it for a shape, and the capacity factor it drops by."""

    build: Callable[[Shape], Layer]
    capacity_factor: float | None = None
    zipf: bool = False


def dense_2d(x_TD: jax.Array, w: Params) -> jax.Array:
    """SwiGLU on [tokens, D]."""
    return (jax.nn.silu(x_TD @ w["gate"]) * (x_TD @ w["up"])) @ w["down"]


def dense_3d(shape: Shape) -> Layer:
    """The same on [sequences, tokens, D]."""

    def layer(x_TD: jax.Array, w: Params) -> jax.Array:
        return dense_2d(x_TD.reshape(-1, shape.group, shape.D), w).reshape(x_TD.shape)

    return layer


def ours(transport: str, capacity_factor: float = 1.25) -> Callable[[Shape], Layer]:
    """`moejax.MoE` with Mixtral's gate, groups of one sequence."""

    def build(shape: Shape) -> Layer:
        def module() -> moejax.MoE:
            return moejax.MoE(
                shape.D, shape.F, shape.E,
                gate=gating.make("mixtral", k=shape.k),
                transport=transport,
                capacity_factor=capacity_factor,
                rngs=nnx.Rngs(0),
            )  # fmt: skip

        graph, state = nnx.split(nnx.eval_shape(module))

        def layer(x_TD: jax.Array, params: Params) -> jax.Array:
            values: dict = {**params, "router": {"router_DE": params["router_DE"]}}
            del values["router_DE"]
            filled = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes to it
            nnx.replace_by_pure_dict(filled, values)
            x_BLD = x_TD.reshape(-1, shape.group, shape.D)
            return nnx.merge(graph, filled)(x_BLD)[0].reshape(x_TD.shape)

        return layer

    return build


def route(x_TD: jax.Array, router_DE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Experts and weights as Mixtral's gate has them."""
    logits_TE = jnp.matmul(x_TD, router_DE, precision="highest")
    top_TK, expert_TK = jax.lax.top_k(logits_TE, k)
    return expert_TK, jax.nn.softmax(top_TK, axis=-1)


def kept_pairs(expert_TK: jax.Array, shape: Shape, capacity_factor: float | None) -> jax.Array:
    """Mask of the pairs that find room, token by token in each group; all without capacity."""
    if capacity_factor is None:
        return jnp.ones(expert_TK.shape, bool)
    return _slot(expert_TK, shape) < _capacity(shape, capacity_factor)


def _capacity(shape: Shape, factor: float) -> int:
    return gating.make("mixtral", k=shape.k).capacity(shape.group, shape.E, factor)


def _slot(expert_TK: jax.Array, shape: Shape) -> jax.Array:
    """Number of earlier pairs of the group that ask for a pair's expert."""
    expert_GN = expert_TK.reshape(-1, shape.group * shape.k)
    one_hot_GNE = jax.nn.one_hot(expert_GN, shape.E, dtype=jnp.int32)
    before_GNE = jnp.cumsum(one_hot_GNE, axis=1) - one_hot_GNE
    return jnp.sum(before_GNE * one_hot_GNE, axis=-1).reshape(expert_TK.shape)


def gshard_einsum(shape: Shape, capacity_factor: float = 1.25) -> Layer:
    """Dispatch and combine as products with one-hot [T, E, C] masks, group by group."""

    def layer(x_TD: jax.Array, params: Params) -> jax.Array:
        expert_TK, weight_TK = route(x_TD, params["router_DE"], shape.k)
        capacity = _capacity(shape, capacity_factor)
        expert_TKE = jax.nn.one_hot(expert_TK, shape.E)
        slot_TKC = jax.nn.one_hot(_slot(expert_TK, shape), capacity)  # no slot past the last
        combine_TEC = jnp.einsum("tk,tke,tkc->tec", weight_TK, expert_TKE, slot_TKC)
        combine_GTEC = combine_TEC.reshape(-1, shape.group, shape.E, capacity)
        dispatch_GTEC = jax.lax.stop_gradient(combine_GTEC > 0).astype(x_TD.dtype)
        x_GTD = x_TD.reshape(-1, shape.group, shape.D)
        x_EGCD = jnp.einsum("gtec,gtd->egcd", dispatch_GTEC, x_GTD)
        gate = jnp.einsum("egcd,edf->egcf", x_EGCD, params["gate_EDF"])
        up = jnp.einsum("egcd,edf->egcf", x_EGCD, params["up_EDF"])
        out_EGCD = jnp.einsum("egcf,efd->egcd", jax.nn.silu(gate) * up, params["down_EFD"])
        return jnp.einsum("gtec,egcd->gtd", combine_GTEC, out_EGCD).reshape(x_TD.shape)

    return layer


def ragged_dot(shape: Shape) -> Layer:
    """Sort pairs by expert, `jax.lax.ragged_dot`, put them back."""

    def layer(x_TD: jax.Array, params: Params) -> jax.Array:
        expert_TK, weight_TK = route(x_TD, params["router_DE"], shape.k)
        order_N = jnp.argsort(expert_TK.reshape(-1))
        size_E = jnp.bincount(expert_TK.reshape(-1), length=shape.E)
        x_ND = x_TD[order_N // shape.k]
        gate = jax.lax.ragged_dot(x_ND, params["gate_EDF"], size_E)
        up = jax.lax.ragged_dot(x_ND, params["up_EDF"], size_E)
        out_ND = jax.lax.ragged_dot(jax.nn.silu(gate) * up, params["down_EFD"], size_E)
        out_TKD = out_ND[jnp.argsort(order_N)].reshape(shape.T, shape.k, shape.D)
        return jnp.sum(weight_TK[..., None] * out_TKD, axis=1)

    return layer


IMPLS: dict[str, Impl] = {
    "dropless": Impl(ours("dropless")),
    "dropless-zipf": Impl(ours("dropless"), zipf=True),
    "cells-1.25": Impl(ours("cells", 1.25), 1.25),
    "cells-1.0": Impl(ours("cells", 1.0), 1.0),
    "gshard-einsum-1.25": Impl(gshard_einsum, 1.25),
    "sort-ragged_dot": Impl(ragged_dot),
}
"""Ours first, then what peers do. "hf-mixtral-*" are in torch_layers.py."""
