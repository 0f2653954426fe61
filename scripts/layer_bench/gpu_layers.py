"""`moejax.MoE` in bfloat16 on a GPU against the dense FFN of equal active FLOPs.

Parameters are float32 and cast to bfloat16 in each step, as in training: the layer's and the dense
FFN's alike. Their values are whole bfloat16 numbers, so that the oracle in float64 has the same.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from scripts.layer_bench import checks, timing
from scripts.layer_bench.gpu_products import DENSE, attempt, fields, head
from scripts.layer_bench.layers import IMPLS, Layer, dense_2d
from scripts.layer_bench.problems import Params, Problem, Shape, make_problem
from scripts.layer_bench.shapes_run import Candidate

KIND = "gpu-layer"
NAMES = ("dropless", "cells-1.25", "cells-1.0")

LIMIT = 2.0**-6
"""Largest error allowed against float64, relative to the largest entry of each array. From input to
output and back some eight results in a row are rounded to bfloat16, each by at most 2^-9 of itself:
2^-6 if all errors agreed."""


def bf16_problem(shape: Shape) -> Problem:
    """Tokens and gradients in bfloat16, parameters in float32 with bfloat16's values."""
    problem = make_problem(shape)

    def rounded(params: Params) -> Params:
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), params)

    return Problem(
        problem.x_TD.astype(jnp.bfloat16),
        rounded(problem.params),
        rounded(problem.dense),
        problem.dy_TD.astype(jnp.bfloat16),
    )


def dense(x_TD: jax.Array, w: Params) -> jax.Array:
    """SwiGLU of hidden size k F in the dtype of the tokens."""
    return dense_2d(x_TD, jax.tree.map(lambda a: a.astype(x_TD.dtype), w))


def error_of(build, capacity_factor: float | None, shape: Shape) -> float:
    """Largest error of a layer and its gradients on the shape, over the largest entries."""
    problem = bf16_problem(shape)
    wanted = checks.expected(problem, shape, capacity_factor)
    run = jax.jit(checks.value_and_gradients(build(shape)))
    got = run(problem.dy_TD, problem.x_TD, problem.params)
    return checks.largest_error(jax.tree.map(lambda a: a.astype(jnp.float32), got), wanted)


class CheckedLayer(Candidate):
    """A layer's two compiled programs, and its error on fewer tokens."""

    def __init__(self, layer: Layer, problem: Problem, params: Params, error: float):
        super().__init__(layer, problem, params)
        self.error = error


def rows(shape: Shape, rounds: int, check_tokens: int) -> Iterator[dict]:
    """Checks, then times; what cannot run or is wrong is a row that says why."""
    problem, small = bf16_problem(shape), checks.shrunk(shape, check_tokens)

    def make(name: str) -> CheckedLayer:
        impl = IMPLS[name]
        error = error_of(impl.build, impl.capacity_factor, small)
        return CheckedLayer(impl.build(shape), problem, problem.params, error)

    layers: dict[str, CheckedLayer] = {}
    for name in NAMES:
        made = attempt(shape, KIND, name, LIMIT, partial(make, name))
        if isinstance(made, dict):
            yield made
        else:
            layers[name] = made
    base = Candidate(dense, problem, problem.dense)
    candidates = {DENSE: base, **layers}
    forward, _ = timing.paired(
        base.run_forward, {n: c.run_forward for n, c in candidates.items()}, rounds
    )
    both, _ = timing.paired(base.run_both, {n: c.run_both for n, c in candidates.items()}, rounds)
    for name in candidates:
        row = {**head(shape, KIND, name), **fields("fwd", forward[name])}
        row.update(fields("fwdbwd", both[name]))
        if name in layers:
            drops = IMPLS[name].capacity_factor is not None
            row.update(max_error=layers[name].error, limit=LIMIT, drops=drops)
        yield row
