"""Presets of published models against their formulas in plain numpy, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.config import default, set_gate

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
    gate, up, down = (np.asarray(w, np.float64) for w in built.expert_weights())
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
            if built.shared_gate:
                weight = np.asarray(built.shared_gate_D[...], np.float64)
                y = y / (1 + np.exp(-token @ weight))
            out[place] += y
    return out


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
    assert built.shared_gate == gated
    width = 0 if built.shared is None else built.shared.up_DF[...].shape[1]
    assert width == shared * F
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    y, info = call(built, x)
    assert (info.routing.weight_GTK > 0).sum() == B * L * k
    # float32 against float64, sums of at most 9 products of width 8.
    np.testing.assert_allclose(y, published(built, x, k, renormalize), rtol=1e-4, atol=1e-5)


def test_deepseek_moe_without_shared_experts_and_with_whole_ones_is_top_k():
    """K_s = 0, m = 1: nothing is left of the two ideas."""
    deepseek = gating.make("deepseek_moe", k=2)
    assert deepseek == gating.make("top_k", k=2, renormalize=False)


@pytest.mark.slow
def test_finer_experts_of_equal_probability_compute_what_the_whole_expert_did():
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


def test_every_preset_of_a_published_model_says_whose_it_is():
    published = {name: gating.source(name) for name in gating.names() if gating.source(name)}
    assert {"deepseek_moe", "qwen_moe", "olmoe", "openmoe", "deepseek_v3"} <= published.keys()
    for name, text in published.items():
        assert "arXiv" in text, name
