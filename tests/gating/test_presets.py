"""Presets of published models against their formulas in plain numpy, one token at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.config import default, set_gate
from moejax.config.tree import get_field

B, L, D, F, E = 2, 7, 8, 6, 16


def layer(name, experts=E, **changes):
    """A layer built as a config with this preset builds it, router and shared gate at random."""
    config = default()
    set_gate(config, name)
    fields = {f: v for f, v in config.moe.gate.to_dict().items() if f != "name"}
    built = moejax.MoE(
        D,
        F,
        experts,
        gate=gating.make(name, **{**fields, **changes}),
        transport="dropless",
        num_shared=config.moe.shared_experts,
        shared_gate=config.moe.shared_gate,
        rngs=nnx.Rngs(0),
    )
    built.router["router_DE"][...] = jax.random.normal(jax.random.key(5), (D, experts))
    if config.moe.shared_gate:
        built.shared_gate_D[...] = jax.random.normal(jax.random.key(6), (D,))
    return built


def call(layer, x):
    return jax.jit(lambda x: layer(x, train=False))(x)


def swiglu(x, gate, up, down):
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def published(built, x, k, renormalize):
    """y = shared(x) (times its gate) + sum over the k best of p_e f_e(x), in float64."""
    gate, up, down = (np.asarray(w, np.float64) for w in built.expert_weights()[:3])
    router = np.asarray(built.router["router_DE"][...], np.float64)
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        token = np.asarray(x[place], np.float64)
        logits = token @ router
        p = np.exp(logits) / np.exp(logits).sum()
        best = sorted(range(len(p)), key=lambda e: -p[e])[:k]
        total = sum(p[e] for e in best) if renormalize else 1.0
        for e in best:
            out[place] += p[e] / total * swiglu(token, gate[e], up[e], down[e])
        if built.shared is not None:
            shared = [np.asarray(w[...], np.float64) for w in
                      (built.shared.gate_DF, built.shared.up_DF, built.shared.down_FD)]  # fmt: skip
            y = swiglu(token, *shared)
            if built.options.shared_gate:
                weight = np.asarray(built.shared_gate_D[...], np.float64)
                y = y / (1 + np.exp(-token @ weight))
            out[place] += y
    return out


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("name", "k", "renormalize", "shared", "gated"),
    [
        ("deepseek_moe", 6, False, 2, False),
        ("qwen_moe", 4, False, 4, True),
        ("olmoe", 8, False, 0, False),
        ("openmoe", 2, False, 1, False),
        ("mixtral", 2, True, 0, False),
    ],
)
def test_a_preset_computes_the_published_layer(name, k, renormalize, shared, gated):
    built = layer(name)
    assert built.gate == gating.TopK(k=k, renormalize=renormalize)
    assert built.options.shared_gate == gated
    width = 0 if built.shared is None else built.shared.up_DF[...].shape[1]
    assert width == shared * F
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    y, info = call(built, x)
    assert (info.routing.weight_GTK > 0).sum() == B * L * k
    # float32 against float64, sums of at most 9 products of width 8.
    np.testing.assert_allclose(y, published(built, x, k, renormalize), rtol=1e-4, atol=1e-5)


def test_deepseek_moe_with_whole_and_no_shared_experts_equals_top_k():
    """K_s = 0, m = 1: nothing is left of the two ideas."""
    deepseek = gating.make("deepseek_moe", k=2)
    assert deepseek == gating.make("top_k", k=2, renormalize=False)


@pytest.mark.slow
def test_finer_experts_of_equal_probability_compute_the_same_as_the_whole_expert():
    """m = 2: both halves of an expert (columns of its hidden layer) are chosen together."""
    whole = moejax.MoE(D, F, 4, gate=gating.make("top_k", k=1, renormalize=False),
                       transport="dropless", rngs=nnx.Rngs(0))  # fmt: skip
    fine = moejax.MoE(D, F // 2, 8, gate=gating.make("deepseek_moe", k=2),
                      transport="dropless", rngs=nnx.Rngs(0))  # fmt: skip
    router = jax.random.normal(jax.random.key(3), (D, 4))
    whole.router["router_DE"][...] = router
    fine.router["router_DE"][...] = jnp.repeat(router, 2, axis=1)
    for name, split in (("gate_EDF", 2), ("up_EDF", 2), ("down_EFD", 1)):
        halves = jnp.stack(jnp.split(getattr(whole, name)[...], 2, axis=split), axis=1)
        getattr(fine, name)[...] = halves.reshape(getattr(fine, name)[...].shape)
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    y, info = call(fine, x)
    np.testing.assert_array_equal(info.routing.expert_GTK[..., 1] // 2,
                                  info.routing.expert_GTK[..., 0] // 2)  # fmt: skip
    # Each half has half the probability of the whole.
    np.testing.assert_allclose(2 * y, call(whole, x)[0], rtol=1e-5, atol=1e-6)


def test_every_preset_of_a_published_model_names_its_source():
    published = {name: gating.source(name) for name in gating.names() if gating.source(name)}
    assert {"deepseek_moe", "qwen_moe", "olmoe", "openmoe", "deepseek_v3"} <= published.keys()
    for name, text in published.items():
        assert "arXiv" in text, name


SPARSE = {"transport": "dropless", "losses.z": 0.0}
RECIPES: dict[str, tuple[dict, dict]] = {
    # Fedus et al., arXiv 2101.03961: top-1, p of all experts (eq. 1-2), alpha = 0.01 over the batch
    # (section 2.2); capacity 1.25 (section 2.2: "1.0, 1.25") and jitter 1e-2 of Mesh TensorFlow.
    "switch": (
        {"k": 1, "renormalize": False, "jitter": 0.01, "init_scale": 0.1},
        {"transport": "cells", "capacity_factor": 1.25, "balance_scope": "batch",
         "losses.load_balance": 0.01, "losses.z": 0.0},
    ),
    # Jiang et al., arXiv 2401.04088, section 2.1; mistralai/Mixtral-8x7B-v0.1 config.json:
    # num_experts_per_tok 2, router_aux_loss_coef 0.02 (k at balance: times 2).
    "mixtral": (
        {"k": 2, "renormalize": True, "jitter": 0.0},
        {**SPARSE, "balance_scope": "batch", "losses.load_balance": 0.04},
    ),
    # Lepikhin et al., arXiv 2006.16668, algorithm 1: two passes over the tokens, first choices
    # first; second expert with probability 2 g2; capacity of a group is 2 S / E. Weight: Mesh
    # TensorFlow's moe_loss_coef 1e-2.
    "gshard": (
        {"second_policy": "random", "threshold": 0.5},
        {"transport": "cells", "capacity_factor": 1.0, "priority": "choice",
         "balance_scope": "group", "losses.load_balance": 0.01, "losses.z": 0.0},
    ),
    # Shazeer et al., arXiv 1701.06538, appendix C.1: both weights 0.1.
    "shazeer": (
        {},
        {**SPARSE, "balance_scope": "batch", "losses.load_balance": 0.0,
         "losses.importance": 0.1, "losses.load": 0.1},
    ),
    "hierarchical": (
        {"k_groups": 2, "k": 2},
        {**SPARSE, "balance_scope": "batch", "losses.load_balance": 0.0,
         "losses.importance": 0.1, "losses.load": 0.1},
    ),
    # Dai et al., arXiv 2401.06066, section 5.1.2: 2 shared, 6 of 64, "do not drop any tokens",
    # "expert-level balance factor of 0.001"; over a sequence (eq. 12-14).
    "deepseek_moe": (
        {"k": 6, "renormalize": False, "jitter": 0.0},
        {**SPARSE, "shared_experts": 2, "losses.load_balance": 0.001},
    ),
    # DeepSeek-AI, arXiv 2405.04434, section 3.1.2: D = 8, M = 3, alpha 0.003, 0.05; config.json of
    # DeepSeek-V2: n_group 8, topk_group 3, group_limited_greedy (max), routed_scaling_factor 16,
    # norm_topk_prob false, scoring_func softmax, n_shared_experts 2, num_experts_per_tok 6.
    "deepseek_v2": (
        {"k": 6, "score": "softmax", "renormalize": False, "route_scale": 16.0, "bias_rate": 0.0,
         "num_groups": 8, "top_groups": 3, "group_score": "max", "sequence_loss": 0.0,
         "device_loss": 0.05},
        {**SPARSE, "shared_experts": 2, "losses.load_balance": 0.003},
    ),
    # DeepSeek-AI, arXiv 2412.19437, section 4.2: gamma 0.001, alpha 0.0001; config.json: n_group 8,
    # topk_group 4, noaux_tc, routed_scaling_factor 2.5, norm_topk_prob true, sigmoid.
    "deepseek_v3": (
        {"k": 8, "score": "sigmoid", "renormalize": True, "route_scale": 2.5, "bias_rate": 0.001,
         "num_groups": 8, "top_groups": 4, "group_score": "top2", "sequence_loss": 0.0001,
         "device_loss": 0.0},
        {**SPARSE, "shared_experts": 1, "losses.load_balance": 0.0},
    ),
    # Qwen/Qwen1.5-MoE-A2.7B config.json: num_experts_per_tok 4, norm_topk_prob false,
    # shared_expert_intermediate_size 5632 = 4 x 1408, router_aux_loss_coef 0.001 (times k).
    "qwen_moe": (
        {"k": 4, "renormalize": False, "jitter": 0.0},
        {**SPARSE, "shared_experts": 4, "shared_gate": True, "balance_scope": "batch",
         "losses.load_balance": 0.004},
    ),
    # Muennighoff et al., arXiv 2409.02060, section 2: alpha 0.01, beta 0.001, dropless.
    "olmoe": (
        {"k": 8, "renormalize": False, "jitter": 0.0},
        {"transport": "dropless", "balance_scope": "batch", "losses.load_balance": 0.01,
         "losses.z": 0.001},
    ),
    # Xue et al., arXiv 2402.01739; released config: router_aux_loss_factor 0.01 (k at balance),
    # router_z_loss_factor 1e-4, router_capacity_factor_train 1.25. First choices of all tokens come
    # before any second one: TokensChooseMaskedRouter of Flaxformer (trained with it), Top2Router of
    # ColossalAI (released inference).
    "openmoe": (
        {"k": 2, "renormalize": False, "jitter": 0.0},
        {"transport": "cells", "capacity_factor": 1.25, "shared_experts": 1, "priority": "choice",
         "losses.load_balance": 0.02, "losses.z": 0.0001},
    ),
    # Rajbhandari et al., arXiv 2201.05596; Megatron-DeepSpeed's scripts: MLC 0.01,
    # MOE_TRAIN_CAP_FACTOR 1.0.
    "residual_moe": (
        {"k": 1, "renormalize": False},
        {"transport": "cells", "capacity_factor": 1.0, "shared_experts": 1, "residual": True,
         "balance_scope": "batch", "losses.load_balance": 0.01, "losses.z": 0.0},
    ),
    # Dai et al., arXiv 2204.08396; released code: capacity twice the mean load.
    "stablemoe": (
        {"balance_weight": 0.3, "distill_weight": 0.3, "stage_steps": 6000},
        {"capacity_factor": 2.0, "losses.load_balance": 0.0, "losses.z": 0.0},
    ),
    # Lewis et al., arXiv 2103.16716: no auxiliary loss (abstract).
    "base": ({}, {"losses.load_balance": 0.0, "losses.z": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_sets_the_published_values(name):
    gate, moe = RECIPES[name]
    made = gating.make(name)
    assert {field: getattr(made, field) for field in gate} == gate
    assert gating.preset_overrides(name) == moe
    config = default()
    set_gate(config, name)
    for field, value in moe.items():
        assert get_field(config, f"moe.{field}") == value
    given = {key.removeprefix("losses."): w for key, w in moe.items() if key.startswith("losses.")}
    assert gating.loss_weights(name) == given


def test_every_preset_of_a_published_model_has_its_recipe_here():
    assert {name for name in gating.names() if gating.source(name)} <= RECIPES.keys()
    assert not any("recalled" in gating.source(name) for name in gating.names())


@pytest.mark.slow
def test_presets_agree_with_the_configs_of_transformers():
    """``router_aux_loss_coef`` there weighs a loss that is k at balance."""
    transformers = pytest.importorskip("transformers")
    qwen, olmoe, deepseek, switch = (
        getattr(transformers, f"{name}Config")()
        for name in ("Qwen2Moe", "Olmoe", "DeepseekV3", "SwitchTransformers")
    )
    for name, theirs in (("qwen_moe", qwen), ("olmoe", olmoe), ("deepseek_v3", deepseek)):
        made: Any = gating.make(name)
        assert made.k == theirs.num_experts_per_tok
        assert made.renormalize == theirs.norm_topk_prob
    qwen_loss = gating.loss_weights("qwen_moe")["load_balance"]
    assert qwen_loss == pytest.approx(qwen.router_aux_loss_coef * qwen.num_experts_per_tok)
    assert gating.loss_weights("olmoe")["load_balance"] == olmoe.router_aux_loss_coef
    v3: Any = gating.make("deepseek_v3")
    jitter = vars(gating.make("switch"))["jitter"]
    assert (v3.route_scale, v3.num_groups, v3.top_groups) == (
        deepseek.routed_scaling_factor, deepseek.n_group, deepseek.topk_group
    )  # fmt: skip
    assert gating.preset_overrides("deepseek_v3")["shared_experts"] == deepseek.n_shared_experts
    assert jitter == switch.router_jitter_noise
