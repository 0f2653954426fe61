"""Layers of the transformers library with our weights give our outputs and our losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating, losses

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs the parity extra: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

B, L, D, F, E = 2, 9, 16, 24, 8


def tensor(x):
    return torch.from_numpy(np.array(x))


def layer_and_tokens(gate, **choices):
    layer = moejax.MoE(D, F, E, gate=gate, transport="dropless", rngs=nnx.Rngs(0), **choices)
    return layer, jax.random.normal(jax.random.key(1), (B, L, D))


def load(module, pairs):
    """Copies weights by parameter name; every name must exist and fit."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in pairs.items():
            parameters.pop(name).copy_(tensor(value))
    assert not parameters, f"not copied: {sorted(parameters)}"


def stacked(layer):
    """transformers stores experts as [E, 2 F, D] (gate and up) and [E, D, F]."""
    gate_EDF, up_EDF, down_EFD = layer.expert_weights()
    fused = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
    return jnp.swapaxes(fused, 1, 2), jnp.swapaxes(down_EFD, 1, 2)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_mixtral_block(k):
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    layer, x = layer_and_tokens(gating.make("mixtral", k=k))
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=k
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    gate_up, down = stacked(layer)
    router = layer.router["router_DE"][...].T
    load(
        block,
        {"gate.weight": router, "experts.gate_up_proj": gate_up, "experts.down_proj": down},
    )
    wanted = block(tensor(x))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    y, _ = layer(x, train=False)
    # Both float32, sums of at most 24 products in another order.
    np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_load_balancing_loss_is_k_times_ours(k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = jax.random.normal(jax.random.key(2), (1, 40, E))
    wanted = load_balancing_loss_func((tensor(logits[0]),), num_experts=E, top_k=k)
    expert, weight = gating.top_k_routing(logits, k)
    ours = losses.load_balance(
        losses.expert_load(expert, weight, E), jax.nn.softmax(logits), jnp.ones((1, 40), bool)
    )
    np.testing.assert_allclose(k * ours, float(wanted), rtol=1e-5)
