"""Models with the options of published ones, on meshes and on one device."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from moejax import gating
from moejax.mesh import make_mesh
from moejax.options import LatentOptions, RopeOptions
from moejax.train.state import shardings
from tests import lms, meshes

MODELS = {
    "biases, sinks and windows": lms.changed(
        lms.config(
            "top_k", num_layers=5, first_dense=1, dense_layers="2", global_every=2, window=4,
            norm="layer", norm_place="both", residual_scale=0.5, attention_bias="all", sinks=True,
            qk_norm="head", score_cap=5.0, num_kv_heads=2, expert_bias=True,
            expert_activation="clamped_swiglu", shared_experts=1, shared_d_ff=20,
            tie_embeddings=False, head_bias=True, embed_scale=3.0, logit_scale=0.5, logit_cap=4.0,
        ),
        gate=gating.TopK(k=2, bias=True),
    ),
    "norms of projections and weighed inputs": lms.changed(
        lms.config(
            "switch", global_every=2, global_rope=False, window=3, window_kind="chunk",
            temperature=0.5, qk_norm="projection", expert_bias=True, weigh_input=True,
            num_kv_heads=2, expert_activation="gelu",
        ),
        gate=gating.LossFree(k=1, score="sigmoid", renormalize=False),
    ),
    "latent attention": lms.changed(
        lms.config(
            latent=LatentOptions(
                kv_rank=6, query_rank=10, plain_width=4, rope_width=4, value_width=6
            ),
            rope=RopeOptions(theta=50.0, scaling="yarn", factor=4.0, trained_length=64),
            attention_bias="all", norm_place="after",
        ),
        gate=gating.LossFree(k=2, score="sqrt_softplus"),
    ),
}  # fmt: skip
MESHES = [{"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}]


@functools.cache
def parameters(name):
    """All away from where they start, so that a bias or sink that is lost shows."""
    flat, tree = jax.tree.flatten(nnx.to_pure_dict(lms.built(MODELS[name])[1]))
    keys = jax.random.split(jax.random.key(7), len(flat))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, flat, strict=True)]
    return jax.tree.unflatten(tree, moved)


def trained_and_evaluated(name, shape):
    """Logits in evaluation, and the gradient of the loss in training."""
    graph, state = lms.built(MODELS[name])
    params, token_BL = parameters(name), lms.tokens()

    def model(params):
        filled = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)

    def loss(params):
        return lms.objective(lms.apply(model(params), token_BL, True), token_BL)

    with meshes.entered(shape):
        if shape is not None:
            mesh = make_mesh(shape, jax.devices()[:8])
            params = jax.device_put(params, shardings(params, mesh))
        logits = jax.jit(lambda p: lms.apply(model(p), token_BL, False)[0])(params)
        gradient = jax.jit(jax.grad(loss))(params)
    return np.asarray(logits), jax.tree.map(np.asarray, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=meshes.name)
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_changes_neither_logits_nor_gradients(name, shape):
    logits, gradient = alone(name)
    got_logits, got_gradient = trained_and_evaluated(name, shape)
    # float32 sums in another order, through several norms
    np.testing.assert_allclose(got_logits, logits, rtol=1e-4, atol=2e-5)
    for path, wanted in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(wanted).max() > 0, path
        got = functools.reduce(lambda tree, key: tree[key.key], path, got_gradient)
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-5, err_msg=str(path))


@functools.cache
def alone(name):
    return trained_and_evaluated(name, None)
