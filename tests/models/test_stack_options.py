"""Options of a whole model against its layers called one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers.basic import FFN
from moejax.options import RopeOptions
from tests import lms
from tests.lms import D

MODELS = {
    "before": lms.config("top_k", residual_scale=0.5, embed_scale=3.0),
    "after": lms.config(
        "top_k", norm="layer", norm_place="after", tie_embeddings=False, head_bias=True
    ),
    "both": lms.config(
        "top_k", norm_place="both", logit_scale=3.0, logit_cap=2.0, residual_scale=2.0
    ),
    "patterns": lms.config(
        "top_k", num_layers=7, first_dense=1, every=2, window=3, global_every=3, global_rope=False,
    ),
    "listed": lms.config("top_k", num_layers=5, first_dense=1, dense_layers="2,4"),
}  # fmt: skip
SPARSE = {
    "before": {0, 1}, "after": {0, 1}, "both": {0, 1}, "patterns": {2, 4, 6}, "listed": {1, 3},
}  # fmt: skip


def blocks_of(model):
    """The layers from the first to the last."""
    graph, params = nnx.split(model.periods)
    periods = (
        nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params))
        for i in range(model.config.num_periods)
    )
    return [*model.first, *(block for period in periods for block in period.blocks)]


def norm(module, x):
    """Layer or RMS norm in numpy; x where there is none."""
    if module is None:
        return x
    centred = x - x.mean(-1, keepdims=True) if hasattr(module, "bias_D") else x
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps)
    bias = np.asarray(module.bias_D[...]) if hasattr(module, "bias_D") else 0.0
    return y * np.asarray(module.scale_D[...]) + bias


@pytest.mark.parametrize("name", MODELS)
def test_a_models_options_change_what_is_added_to_the_residual_stream(name):
    settings = MODELS[name]
    model, token_BL = lms.model_of(settings), lms.tokens()
    place, context, number = settings.norm_place, lms.context(token_BL), 0
    x = np.asarray(model.embed_VD[...])[token_BL] * (settings.text.embed_scale or D**0.5)
    state = model.init_gate_state()
    for layer, block in enumerate(blocks_of(model)):
        has = tuple(n is not None for n in (block.attention_norm, block.attention_out_norm))
        assert has == (place != "after", place != "before")
        y = block.attention(jnp.asarray(norm(block.attention_norm, x), jnp.float32), context)[0]
        x = x + settings.residual_scale * norm(block.attention_out_norm, np.asarray(y))
        inner = jnp.asarray(norm(block.ffn_norm, x), jnp.float32)
        assert isinstance(block.ffn, FFN) == (layer not in SPARSE[name])
        if isinstance(block.ffn, FFN):
            y = block.ffn(inner)
        else:
            own = jax.tree.map(lambda s, n=number: s[n], state)
            y, number = block.ffn(inner, context, own, False)[0], number + 1
        x = x + settings.residual_scale * norm(block.ffn_out_norm, np.asarray(y))
    head = model.embed_VD[...].T if settings.text.tie_embeddings else model.head_DV[...]
    logits = norm(model.final_norm, x) @ np.asarray(head)
    if settings.text.head_bias:
        logits = logits + np.asarray(model.head_bias_V[...])
    logits = settings.text.logit_scale * logits
    cap = settings.text.logit_cap
    wanted = cap * np.tanh(logits / cap) if cap else logits
    assert number == len(SPARSE[name]) == settings.num_moe_layers
    np.testing.assert_allclose(lms.run(settings, token_BL, False)[0], wanted, rtol=1e-4, atol=1e-4)


def test_every_third_layer_of_the_model_has_no_window_and_no_rotation():
    options = [block.attention.options for block in blocks_of(lms.model_of(MODELS["patterns"]))]
    assert [o.window for o in options] == [3, 3, 0, 3, 3, 0, 3]
    rotated = RopeOptions(theta=100.0)
    assert [o.rope.theta for o in options] == [rotated.theta if o.window else None for o in options]
