"""Shapes, and the arrays that every implementation of a shape works on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    """T tokens of width D, E experts of hidden width F, k of them per token."""

    name: str
    T: int
    D: int
    F: int
    E: int
    k: int
    sequence: int = 512
    """Tokens per sequence, as the peers were measured; the routing group."""

    @property
    def group(self) -> int:
        """Tokens per routing group."""
        return min(self.sequence, self.T)


SHAPES = {
    s.name: s
    for s in (
        Shape("A", 4096, 256, 1024, 8, 2),
        Shape("B", 8192, 256, 512, 64, 2),
        Shape("C", 4096, 512, 1024, 16, 4),
        Shape("tiny", 64, 8, 16, 8, 2, sequence=8),
    )
}

GPU_SHAPES = {
    s.name: s
    for s in (
        Shape("fine", 16384, 2048, 1408, 64, 6),
        Shape("mixtral", 16384, 4096, 14336, 8, 2),
    )
}

Params = dict[str, jax.Array]
"""``router_DE``, ``gate_EDF``, ``up_EDF``, ``down_EFD``: what every MoE layer here is made of."""


class Problem(NamedTuple):
    x_TD: jax.Array
    params: Params
    dense: Params
    """An FFN of hidden width k F: as many FLOPs per token as k experts."""
    dy_TD: jax.Array


def make_problem(shape: Shape, *, zipf: bool = False, seed: int = 0) -> Problem:
    """Standard normal tokens; logits with standard deviation 1, so that loads are nearly even.

    With ``zipf`` the log-probability of the expert of rank r falls by log r: one input is 1 for
    every token, and its row of the router holds the biases.
    """
    _, T, D, F, E, k, _ = shape
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def normal(*dims: int) -> jax.Array:
        return jax.random.normal(next(keys), dims) / jnp.sqrt(jnp.float32(dims[-2]))

    x_TD = jax.random.normal(next(keys), (T, D)).at[:, 0].set(1.0)
    bias_E = -jnp.log(jnp.arange(1.0, E + 1)) if zipf else jnp.zeros(E)
    params = {
        "router_DE": normal(D, E).at[0].set(bias_E),
        "gate_EDF": normal(E, D, F),
        "up_EDF": normal(E, D, F),
        "down_EFD": normal(E, F, D),
    }
    dense = {"gate": normal(D, k * F), "up": normal(D, k * F), "down": normal(k * F, D)}
    return Problem(x_TD, params, dense, jax.random.normal(next(keys), (T, D)))
