"""Biases, activations and weighed inputs of experts against a loop over pairs in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from moejax import gating
from moejax.dispatch import TRANSPORTS
from moejax.layers.moe import MoELayer
from moejax.options import DispatchOptions, MoEOptions

B, L, D, F, E = 2, 6, 8, 5, 4


def hidden(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if activation == "swiglu":
        return gate * scipy.special.expit(gate) * up
    if activation == "relu":
        return np.maximum(up, 0)
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)  # as GPT-OSS has it
    return (up + 1.0) * gate * scipy.special.expit(1.702 * gate)


def layer_of(gate, transport="dropless", **options) -> MoELayer:
    """A layer whose biases matter, and whose hidden numbers reach the limits of the activation."""
    config = DispatchOptions(
        num_experts=E, transport=transport, eval_transport=transport, capacity_factor=0.5,
        eval_capacity_factor=0.5,
    ).config  # fmt: skip
    made = MoELayer(D, MoEOptions(gate=gate, config=config, d_ff=F, **options), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for name, variable in vars(made).items():
        if "_bias_" in name:
            variable[...] = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
        elif name in ("gate_EDF", "up_EDF"):
            variable[...] = 6.0 * variable[...]
    return made


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (B, L, D))


def by_hand(layer: MoELayer, x: np.ndarray, info) -> np.ndarray:
    """Pair by pair, with the routing and the pairs kept that the layer reports."""
    options = layer.options
    leaf = lambda name: np.asarray(getattr(layer, name)[...], np.float64)
    routed = info.routing.expert_GTK, info.routing.weight_GTK
    expert, weight = (np.asarray(a).reshape(B, L, -1) for a in routed)
    kept = np.asarray(info.kept_GTK).reshape(expert.shape)
    y = np.zeros(x.shape)
    for b, t, k in np.ndindex(expert.shape):
        e, w = expert[b, t, k], float(weight[b, t, k])
        if not kept[b, t, k]:
            continue
        token = x[b, t] * w if options.weigh_input else x[b, t]
        up = token @ leaf("up_EDF")[e]
        gate = token @ leaf("gate_EDF")[e] if hasattr(layer, "gate_EDF") else up
        if options.expert_bias:
            up = up + leaf("up_bias_EF")[e]
            gate = gate + leaf("gate_bias_EF")[e] if hasattr(layer, "gate_EDF") else gate
        out = hidden(options.activation, gate, up) @ leaf("down_EFD")[e]
        if options.expert_bias:
            out = out + leaf("down_bias_ED")[e]
        y[b, t] += out if options.weigh_input else w * out
    return y


def check(layer: MoELayer, train: bool) -> np.ndarray:
    x = tokens()
    y, info = jax.jit(lambda x: layer(x, train=train))(x)
    wanted = by_hand(layer, np.asarray(x, np.float64), info)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)  # float32, outputs of up to 100
    return np.asarray(info.kept_GTK)


@pytest.mark.parametrize("activation", ["swiglu", "relu", "clamped_swiglu"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_adds_the_biases_of_the_pairs_that_arrive(transport, activation):
    gate = gating.make("top_k", k=2)
    kept = check(layer_of(gate, transport, expert_bias=True, activation=activation), True)
    assert kept.all() == (transport != "cells"), "cells have room for half of the pairs"


@pytest.mark.parametrize("transport", ["cells", "dropless"])
@pytest.mark.parametrize("expert_bias", [False, True])
def test_the_weight_is_a_factor_of_the_input_where_options_say_so(expert_bias, transport):
    gate = gating.LossFree(k=1, renormalize=False, bias_rate=0.0, sequence_loss=0.0)
    check(layer_of(gate, transport, weigh_input=True, expert_bias=expert_bias), False)


def test_shared_experts_have_their_own_width():
    layer = layer_of(gating.make("top_k"), shared_experts=2, shared_d_ff=7)
    assert layer.shared is not None and layer.shared.up_DF[...].shape == (D, 7)
    layer = layer_of(gating.make("top_k"), shared_experts=2)
    assert layer.shared is not None and layer.shared.up_DF[...].shape == (D, 2 * F)
