"""Bytes of a layer: temporaries of its compiled programs, and what its backward pass keeps."""

from typing import Any

import jax

from moejax.train.cost.memory import residual_bytes
from scripts.layer_bench.layers import Layer
from scripts.layer_bench.problems import Problem, Shape


def temp_bytes(compiled: Any) -> int:
    """Temporaries of a compiled program, arguments and results not included."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this platform does not say how much memory a program needs")
    return analysis.temp_size_in_bytes


def saved_per_token(layer: Layer, problem: Problem) -> float:
    """Bytes per token that are kept for the backward pass, the layer's input included."""
    x_TD, params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (problem.x_TD, problem.params)
    )
    return (residual_bytes(layer, x_TD, params) + x_TD.size * 4) / x_TD.shape[0]


def saved_floor(shape: Shape) -> int:
    """Float32 bytes per token of k (D + 2 F) + D: packed rows, gate, up, and the input."""
    return 4 * (shape.k * (shape.D + 2 * shape.F) + shape.D)


def exchange_buffers(shape: Shape, capacity_factor: float | None) -> int:
    """Bytes of the packed rows there and back, and of their gradients."""
    rows = shape.T * shape.k * (capacity_factor or 1.0)
    return int(4 * rows * shape.D * 4)
