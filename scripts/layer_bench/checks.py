"""Outputs and gradients of a layer against `moejax.reference` in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax import reference
from moejax.types import ExpertWeights, Routing
from scripts.layer_bench.layers import Impl, kept_pairs, route
from scripts.layer_bench.problems import Params, Problem, Shape, make_problem

LIMIT = 1e-4
"""Largest error allowed, relative to the largest entry of each array. Float32 sums of up to a few
thousand terms, in any order, stay a factor of ten below; one pair routed, dropped or weighted
wrongly is above."""


def value_and_gradients(layer: Callable) -> Callable:
    """(dy, x, params) -> the output and the gradients of x and of every parameter."""

    def both(dy_TD: jax.Array, x_TD: jax.Array, params: Params):
        y_TD, vjp = jax.vjp(layer, x_TD, params)
        return y_TD, *vjp(dy_TD)

    return both


def shrunk(shape: Shape, tokens: int) -> Shape:
    """The shape with at most ``tokens`` tokens, in whole groups; 0 keeps all."""
    if not tokens or tokens >= shape.T:
        return shape
    return shape._replace(T=max(tokens // shape.group, 1) * shape.group)


def expected(problem: Problem, shape: Shape, capacity_factor: float | None):
    """The oracle's output and gradients in float64, for the routing that float32 logits give."""
    expert_TK, _ = route(problem.x_TD, problem.params["router_DE"], shape.k)
    kept_TK = kept_pairs(expert_TK, shape, capacity_factor)
    with jax.enable_x64(True):

        def oracle(x_TD: jax.Array, params: Params) -> jax.Array:
            logits_TE = x_TD @ params["router_DE"]
            chosen_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=1)
            routing = Routing(expert_TK[None], jax.nn.softmax(chosen_TK, axis=-1)[None])
            weights = ExpertWeights(params["gate_EDF"], params["up_EDF"], params["down_EFD"])
            return reference.moe(x_TD[None], routing, weights, "swiglu", kept_TK[None])[0]

        wide = jax.tree.map(
            lambda a: a.astype(jnp.float64), (problem.dy_TD, problem.x_TD, problem.params)
        )
        return jax.device_get(jax.jit(value_and_gradients(oracle))(*wide))


def largest_error(got, wanted) -> float:
    """Largest absolute difference over the largest entry, over all arrays of two trees."""

    def error(a, b) -> float:
        return float(abs(jax.device_get(a) - b).max() / abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(error, tuple(got), tuple(wanted))))


def check(impl: Impl, shape: Shape, tokens: int, wanted: dict | None = None) -> float:
    """The largest error of an implementation. ``wanted`` keeps the oracle's answers between calls.

    Raises:
      ArithmeticError: it is above `LIMIT`.
    """
    small = shrunk(shape, tokens)
    problem = make_problem(small, zipf=impl.zipf)
    key = (small, impl.zipf, impl.capacity_factor)
    wanted = {} if wanted is None else wanted
    if key not in wanted:
        wanted[key] = expected(problem, small, impl.capacity_factor)
    run = jax.jit(value_and_gradients(impl.build(small)))
    error = largest_error(run(problem.dy_TD, problem.x_TD, problem.params), wanted[key])
    if not error <= LIMIT:
        raise ArithmeticError(f"shape {shape.name}: outputs or gradients are off by {error:.1e}")
    return error
