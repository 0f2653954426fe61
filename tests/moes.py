"""One MoE layer with its gradients, and the comparison of two runs of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moejax
from moejax import gating
from tests import meshes

B, L, D, F, E = 8, 6, 8, 12, 8


def make(gate="mixtral", experts=E, gate_fields=None, **choices):
    """A layer; ``gate_fields`` as a dict or as items, which a cache can hold."""
    gate = gating.make(gate, **dict(gate_fields or {}))
    return moejax.MoE(D, F, experts, gate=gate, rngs=nnx.Rngs(0), **choices)


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, L, D))


def context(**known):
    return moejax.Context.of(B, L, key=jax.random.key(3), **known)


@functools.cache
def program(gate, mesh_name, train, choices):
    """Value, output, info and gradients of a layer with router losses in the objective."""
    del mesh_name
    layer = make(gate, **dict(choices))
    graph, params = nnx.split(layer)

    def objective(params, x, context):
        y, info = nnx.merge(graph, params)(x, context, train=train)
        total = jnp.sum(jnp.sin(2 * y)) + sum(info.losses.values())
        return total, (y, info)

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True)), params


def run(shape, gate, x, context, train=True, **choices):
    with meshes.entered(shape):
        step, params = program(
            gate, "none" if shape is None else meshes.name(shape), train, tuple(choices.items())
        )
        return jax.device_get(step(params, x, context))


def same(got, wanted, tolerance=2e-5):
    """float32 reductions over the batch in another order; routing and counts exactly equal."""
    (value, (y, info)), grads = got
    (value_, (y_, info_)), grads_ = wanted
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(value, value_)
    close(y, y_)
    jax.tree.map(close, info.losses, info_.losses)
    jax.tree.map(close, grads, grads_)
    np.testing.assert_array_equal(info.routing.expert_GTK, info_.routing.expert_GTK)
    np.testing.assert_array_equal(info.kept_GTK, info_.kept_GTK)
    for name in ("tokens", "load_E", "dropped_E", "dropped_L", "unserved_tokens"):
        np.testing.assert_array_equal(getattr(info.stats, name), getattr(info_.stats, name))
