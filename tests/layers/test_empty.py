"""Batches without a valid token: no sequences, no positions, or nothing but padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating

SHAPES = {"no_sequences": (0, 6), "no_positions": (2, 0), "padding": (2, 6)}
GATES = ["mixtral", "base", "expert_choice", "soft", "lory"]


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "gate", [pytest.param(g, marks=() if g == "mixtral" else pytest.mark.slow) for g in GATES]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_batch_without_valid_tokens_gives_zeros_and_finite_numbers(gate, shape, train):
    layer = moejax.MoE(8, 12, 4, gate=gating.make(gate), num_shared=1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x_BLD = jnp.full((*shape, 8), jnp.nan)
    context = moejax.Context.of(
        *shape,
        token_BL=jnp.zeros(shape, int),
        valid_BL=jnp.zeros(shape, bool),
        key=jax.random.key(0),
    )

    def loss(params):
        y_BLD, info = nnx.merge(graph, params)(x_BLD, context, train=train)
        return jnp.sum(y_BLD) + sum(info.losses.values()), (y_BLD, info)

    (value, (y_BLD, info)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert y_BLD.shape == x_BLD.shape and (np.asarray(y_BLD) == 0).all()
    assert int(info.stats.tokens) == int(info.stats.load_E.sum()) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads, info.losses)))
