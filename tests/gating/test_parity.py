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
    gate_EDF, up_EDF, down_EFD, *_ = layer.expert_weights()
    fused = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
    return jnp.swapaxes(fused, 1, 2), jnp.swapaxes(down_EFD, 1, 2)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_mixtral_block_equals_that_of_transformers(k):
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


def shared_weights(layer, name):
    """transformers stores matrices as [out, in]."""
    shared = layer.shared
    return {
        f"{name}.gate_proj.weight": shared.gate_DF[...].T,
        f"{name}.up_proj.weight": shared.up_DF[...].T,
        f"{name}.down_proj.weight": shared.down_FD[...].T,
    }


def routed_weights(layer):
    gate_up, down = stacked(layer)
    return {
        "gate.weight": layer.router["router_DE"][...].T,
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": down,
    }


def compare(block, layer, x, state=None):
    wanted = block(tensor(x))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    y, _ = layer(x, gate_state=state, train=False)
    # Both float32, sums of at most 96 products in another order.
    np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_the_qwen_moe_block_equals_that_of_transformers():
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    preset = gating.preset_overrides("qwen_moe")
    num_shared = preset["shared_experts"]
    layer, x = layer_and_tokens(
        gating.make("qwen_moe"), num_shared=num_shared, shared_gate=preset["shared_gate"]
    )
    layer.shared_gate_D[...] = jax.random.normal(jax.random.key(3), (D,))
    config = transformers.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=num_shared * F,
        num_experts=E,
        num_experts_per_tok=4,
    )
    config._experts_implementation = "eager"
    block = Qwen2MoeSparseMoeBlock(config)
    shared = {"shared_expert_gate.weight": layer.shared_gate_D[...][None]}
    shared |= shared_weights(layer, "shared_expert")
    load(block, routed_weights(layer) | shared)
    compare(block, layer, x)


def test_the_olmoe_block_equals_that_of_transformers():
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    layer, x = layer_and_tokens(gating.make("olmoe", k=3))
    config = transformers.OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=3
    )
    config._experts_implementation = "eager"
    block = OlmoeSparseMoeBlock(config)
    load(block, routed_weights(layer))
    compare(block, layer, x)


def test_the_deepseek_v3_block_equals_that_of_transformers():
    """With biases that leave every biased score positive: transformers masks groups with 0."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    gate = gating.make("deepseek_v3", k=3, num_groups=4, top_groups=2)
    layer, x = layer_and_tokens(gate, num_shared=1)
    bias = jax.random.uniform(jax.random.key(4), (E,))
    config = transformers.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    block = DeepseekV3MoE(config)
    load(block, routed_weights(layer) | shared_weights(layer, "shared_experts"))
    block.gate.e_score_correction_bias.copy_(tensor(bias))
    compare(block, layer, x, {"bias_E": bias})


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
