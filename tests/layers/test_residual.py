"""Residual MoE: routed and shared experts mixed with weights per token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from tests import moes
from tests.moes import D, F


def make(**choices):
    gate = gating.make("residual_moe")
    return moejax.MoE(D, F, 4, gate=gate, rngs=nnx.Rngs(0), **{"num_shared": 1, **choices})


def test_the_output_is_a_convex_mixture_of_routed_and_shared_experts_in_that_order():
    """Coefficient 0 weighs the routed experts and 1 the others, as in DeepSpeed's code."""
    layer, x_BLD = make(residual=True), moes.tokens()
    plain = make(residual=True)  # the same weights
    plain.shared = None

    def parts(x_BLD):
        assert layer.shared is not None
        return layer(x_BLD)[0], layer.shared(x_BLD), plain(x_BLD)[0]

    y_BLD, shared_BLD, routed_BLD = map(np.float64, jax.jit(parts)(x_BLD))
    logits = np.asarray(x_BLD) @ np.asarray(layer.residual_DN[...]) + layer.residual_bias_N[...]
    weight = np.exp(np.float64(logits))
    weight /= weight.sum(-1, keepdims=True)
    wanted = weight[..., :1] * routed_BLD + weight[..., 1:] * shared_BLD
    assert np.abs(routed_BLD).max() > 0.1 and np.abs(shared_BLD).max() > 0.1
    # float32 against float64 in a sum of two and a softmax.
    np.testing.assert_allclose(y_BLD, wanted, rtol=1e-5, atol=1e-6)
    limit = D**-0.5
    for param in (layer.residual_DN, layer.residual_bias_N):
        assert np.abs(param[...]).max() <= limit and np.std(param[...]) > 0.1 * limit


def test_coefficients_and_both_branches_have_gradients():
    graph, params = nnx.split(make(residual=True))

    def loss(params):
        y_BLD, info = nnx.merge(graph, params)(moes.tokens())
        return jnp.sum(jnp.sin(2 * y_BLD)) + info.losses["load_balance"]

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-4, path
    assert {"residual_DN", "residual_bias_N", "shared", "up_EDF"} <= set(grads)


@pytest.mark.parametrize("choices", [{"num_shared": 0}, {"shared_gate": True}], ids=str)
def test_residual_needs_a_shared_expert_without_its_own_weight(choices):
    with pytest.raises(ValueError, match="residual=True"):
        make(residual=True, **choices)
