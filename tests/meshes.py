"""Meshes and routings shared by the tests that compare them."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.mesh import make_mesh
from moejax.types import Routing

SMALL = {"data": 1}
LARGE = {"data": 2, "expert": 4}
ALL = [
    {"data": 1},
    {"expert": 2},
    {"data": 2, "expert": 2},
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"data": 4, "expert": 2},
    {"data": 8},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 2, "tensor": 2},
]


def name(shape):
    return "-".join(f"{axis}{size}" for axis, size in shape.items())


def entered(shape):
    """Context manager of the mesh, or of no mesh at all for None."""
    if shape is None:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(shape, jax.devices()[: math.prod(shape.values())]))


def routing(kind, groups, tokens, columns, num_experts, seed=0):
    """A synthetic routing: the load pattern is the point, the weights are random."""
    rng = np.random.default_rng(seed)
    shape = (groups, tokens)
    index = np.arange(groups * tokens).reshape(shape)
    if kind == "balanced":
        first = index % num_experts
    elif kind == "zipf":
        share = 1.0 / np.arange(1, num_experts + 1) ** 1.5
        first = rng.choice(num_experts, size=shape, p=share / share.sum())
    elif kind == "all_to_one":
        first = np.zeros(shape, int)
    elif kind == "half_empty":
        first = rng.integers(0, num_experts // 2, size=shape)
    else:
        raise ValueError(kind)
    step = num_experts // 2 if kind == "half_empty" else num_experts
    expert = np.stack([(first + i) % step for i in range(columns)], axis=-1)
    weight = rng.random((*shape, columns)).astype(np.float32) + 0.1
    return Routing(jnp.asarray(expert, jnp.int32), jnp.asarray(weight))


KINDS = ["balanced", "zipf", "all_to_one", "half_empty"]


def inactive(given, seed=1):
    """The same with a third of the columns inactive and the last tokens of each group padding."""
    rng = np.random.default_rng(seed)
    weight = np.array(given.weight_GTK)
    weight[rng.random(weight.shape) < 1 / 3] = 0.0
    weight[:, -2:] = 0.0
    return Routing(given.expert_GTK, jnp.asarray(weight))
