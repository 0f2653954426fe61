"""Models read token by token, with a memory, against the same tokens read at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.dispatch import Dropless
from moejax.options import LatentOptions, RopeOptions
from moejax.types import Context, MoEConfig
from tests import lms, meshes
from tests.lms import E, L, V, built, model_of

DROPLESS = {"moe": MoEConfig(E, Dropless(), Dropless())}
MODELS = {
    "dense first layer and shared experts": lms.config(
        "mixtral", num_layers=5, every=2, first_dense=1, shared_experts=2, num_kv_heads=2
    ),
    "a window in every second layer": lms.config(
        "loss_free", num_layers=4, window=3, global_every=2, sinks=True
    ),
    "two mixtures in a period": lms.config("top_k", num_layers=4, window=4, global_every=2),
    "listed dense layers": lms.config("top_k", num_layers=4, dense_layers="1"),
    "norms after, LayerNorm": lms.config("top_k", norm="layer", norm_place="after"),
    "norms around, scaled": lms.config("top_k", norm_place="both", residual_scale=0.5),
    "latent attention": lms.config(
        "loss_free",
        latent=LatentOptions(kv_rank=6, plain_width=4, rope_width=4, value_width=4),
        rope=RopeOptions(theta=50.0, interleaved=True),
    ),
    "heads chosen per token": lms.config(every=0, moa_experts=5),
    "blocks that tokens may skip": lms.config("top_k", every=2, mod_capacity=0.5),
    "expert biases": lms.config(
        "top_k", expert_bias=True, expert_activation="clamped_swiglu", residual=False
    ),
}
ROWS = 4
LENGTHS = np.array([L, 5, L - 1, 6])
VALID = np.arange(L) >= L - LENGTHS[:, None]
"""Prompts of unequal lengths have padding in front."""


def known(token_BL, valid_BL, position_BL):
    return Context.of(
        *token_BL.shape, token_BL=token_BL, valid_BL=valid_BL, position_BL=position_BL
    )


@functools.cache
def programs(name):
    settings = lms.changed(MODELS[name], **DROPLESS)
    params = built(settings)[1]

    def whole(params, token_BL, context):
        model = model_of(settings, params)
        return model(token_BL, context, model.init_gate_state(), False)[0]

    def step(params, token_BL, context, memory):
        model = model_of(settings, params)
        logits, aux = model(token_BL, context, model.init_gate_state(), False, memory=memory)
        return logits, aux.memory

    return jax.jit(whole), jax.jit(step), params, lambda: model_of(settings)


def in_parts(name, token_BL, cuts):
    """Logits where the tokens between two cuts are read at once."""
    _, step, params, model = programs(name)
    context, found = known(token_BL, jnp.asarray(VALID), positions()), []
    memory = model().empty_memory(ROWS, L + 2)
    for start, end in zip(cuts, cuts[1:], strict=False):
        at = np.s_[:, start:end]
        part = known(token_BL[at], context.valid_BL[at], context.position_BL[at])
        logits, memory = step(params, token_BL[at], part, memory)
        found.append(logits)
    assert int(memory.length) == cuts[-1]
    return np.concatenate(found, axis=1)


def positions():
    return jnp.asarray(np.maximum(np.arange(L) - (L - LENGTHS[:, None]), 0))


@pytest.mark.parametrize("name", MODELS)
def test_logits_token_by_token_are_those_of_the_whole_text(name):
    whole, _, params, _ = programs(name)
    token_BL = jax.random.randint(jax.random.key(4), (ROWS, L), 0, V)
    wanted = np.asarray(whole(params, token_BL, known(token_BL, jnp.asarray(VALID), positions())))
    got = in_parts(name, token_BL, [0, 3, *range(4, L + 1)])
    np.testing.assert_allclose(got[VALID], wanted[VALID], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 2, "expert": 2}, {"expert": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["dense first layer and shared experts", "latent attention"])
def test_decoding_on_a_mesh_gives_the_same_logits(name, shape):
    token_BL = jax.random.randint(jax.random.key(4), (ROWS, L), 0, V)
    wanted = in_parts(name, token_BL, [0, 3, *range(4, L + 1)])
    programs.cache_clear()
    with meshes.entered(shape):
        got = in_parts(name, token_BL, [0, 3, *range(4, L + 1)])
    programs.cache_clear()
    np.testing.assert_allclose(got[VALID], wanted[VALID], rtol=1e-5, atol=1e-5)


def test_a_step_of_decoding_is_compiled_once():
    name = "a window in every second layer"
    token_BL = jax.random.randint(jax.random.key(4), (ROWS, L), 0, V)
    step: Any = programs(name)[1]
    in_parts(name, token_BL, [0, 3, 4])
    before = step._cache_size()
    in_parts(name, token_BL, [0, 3, *range(4, L + 1)])
    assert step._cache_size() == before


def test_layers_with_experts_are_numbered_in_the_order_of_the_model():
    """Two in a period: losses and loads have one entry for each, from the first to the last."""
    settings = lms.changed(MODELS["two mixtures in a period"], **DROPLESS)
    assert (settings.period, settings.sparse_places, settings.num_moe_layers) == (2, (0, 1), 4)
    graph, params = nnx.split(model_of(settings))
    token_BL = lms.tokens()

    def load(params):
        model = nnx.merge(graph, params)
        stats = lms.apply(model, token_BL, False)[1].stats
        assert stats is not None
        return stats.load_E

    before = jax.jit(load)(params)
    assert before.shape == (4, E)
    for layer in range(4):  # a router of zeros sends every token to the first experts
        changed = jax.tree.map(lambda x: x, params)
        place, index = layer % 2, layer // 2
        router = changed["periods"]["blocks"][place]["ffn"]["router"]["router_DE"]
        router[...] = router[...].at[index].set(0.0)
        after = np.asarray(jax.jit(load)(changed))
        same = [(after[i] == before[i]).all() for i in range(4)]
        assert same[:layer] == [True] * layer and not same[layer]
        assert (after[layer, :2] > 0).all() and (after[layer, 2:] == 0).all()
