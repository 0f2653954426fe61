"""Mixture of Attention heads against loops, ordinary attention, and a count of its work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.layers.attention import Attention
from moejax.layers.moa import MixtureOfHeads
from moejax.options import AttentionOptions, HeadsOptions, RopeOptions
from moejax.train.cost.flops import count_flops
from moejax.types import Context
from tests.layers import blocks

B, L, D, I, THETA = 3, 6, 12, 4, 100.0
LENGTHS = np.array([6, 4, 1])
VALID = np.arange(L) < LENGTHS[:, None]
ATTENTION = AttentionOptions(head_dim=I, rope=RopeOptions(theta=THETA), implementation="xla")
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
"""float32 against float64 or another order of at most 12 products and a softmax."""


def make(experts=5, k=2, causal=True):
    attention = dataclasses.replace(ATTENTION, causal=causal)
    layer = MixtureOfHeads(D, HeadsOptions(experts, k), attention, rngs=nnx.Rngs(0))
    layer.router["router_DE"][...] = jax.random.normal(jax.random.key(1), (D, experts))
    return layer


def tokens():
    return jax.random.normal(jax.random.key(2), (B, L, D))


def context(valid=VALID):
    position_BL = 2 * jnp.arange(L) + jnp.array([[0], [3], [1]])
    return Context.of(B, L, valid_BL=jnp.asarray(valid), position_BL=position_BL)


def run(layer, x_BLD, given, **choices):
    graph, params = nnx.split(layer)
    return jax.jit(lambda p, x: nnx.merge(graph, p)(x, given, True, **choices))(params, x_BLD)


def leaf(param):
    return np.asarray(param[...], np.float64)


def loop(layer, k, x_BLD, valid_BL, position_BL):
    """Token by token: its k most probable heads, weighed by their shares, and how often each."""
    x, wanted = np.asarray(x_BLD, np.float64), np.zeros(x_BLD.shape)
    load = np.zeros(layer.options.experts)
    query, out, router = leaf(layer.query_EDI), leaf(layer.out_EID), leaf(layer.router["router_DE"])
    for b in range(B):
        key, value = x[b] @ leaf(layer.key_DI), x[b] @ leaf(layer.value_DI)
        causal = layer.attention.causal
        heads = [
            blocks.head(x[b] @ q, key, value, position_BL[b], valid_BL[b], THETA, causal)
            for q in query
        ]
        for t in np.flatnonzero(valid_BL[b]):
            p = blocks.softmax(x[b, t] @ router)
            best = np.argsort(-p)[:k]
            load[best] += 1
            wanted[b, t] = sum(p[e] / p[best].sum() * heads[e][t] @ out[e] for e in best)
    return wanted, load


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_every_token_uses_its_k_best_heads(causal):
    layer, x_BLD, given = make(causal=causal), tokens(), context()
    y_BLD, aux = run(layer, x_BLD, given)
    wanted, load = loop(layer, 2, x_BLD, VALID, np.asarray(given.position_BL))
    CLOSE(y_BLD[VALID], wanted[VALID])
    assert set(aux.losses) == {"moa_load_balance", "moa_z"}
    CLOSE(aux.means["moa/max_vio"], load.max() / load.mean() - 1)
    logits = (np.asarray(x_BLD, np.float64) @ leaf(layer.router["router_DE"]))[VALID]
    CLOSE(aux.losses["moa_z"], np.mean(np.log(np.exp(logits).sum(-1)) ** 2))
    balance = 0.0
    for row, length in zip(np.asarray(x_BLD, np.float64), LENGTHS, strict=True):
        probs = np.stack(
            [blocks.softmax(h) for h in row[:length] @ leaf(layer.router["router_DE"])]
        )
        best = np.argsort(-probs)[:, :2]
        share = np.bincount(best.ravel(), minlength=5) / best.size
        balance += length * 5 * (share * probs.mean(0)).sum()
    CLOSE(aux.losses["moa_load_balance"], balance / LENGTHS.sum())


def test_padding_between_valid_tokens_is_masked():
    layer, x_BLD = make(), tokens()
    valid = VALID.copy()
    valid[:, ::3] = False
    given = context(valid)
    wanted, _ = loop(layer, 2, x_BLD, valid, np.asarray(given.position_BL))
    CLOSE(run(layer, x_BLD, given)[0][valid], wanted[valid])


@pytest.mark.quick(1)
@pytest.mark.parametrize("heads", [1, 3])
def test_moa_with_all_heads_and_equal_weights_equals_multi_query_attention(heads):
    """Every head has weight 1 / heads: 1 where there is a single head."""
    layer = make(heads, heads)
    layer.router["router_DE"][...] = jnp.zeros((D, heads))
    options = dataclasses.replace(ATTENTION, num_heads=heads, num_kv_heads=1)
    plain = Attention(D, options, rngs=nnx.Rngs(1))
    plain.query_DHI[...] = jnp.swapaxes(layer.query_EDI[...], 0, 1)
    plain.key_DJI[...] = layer.key_DI[...][:, None]
    plain.value_DJI[...] = layer.value_DI[...][:, None]
    plain.out_HID[...] = layer.out_EID[...] / heads
    given = context()
    wanted_BLD = jax.jit(lambda x: plain(x, given)[0])(tokens())
    CLOSE(run(layer, tokens(), given)[0][VALID], wanted_BLD[VALID])


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_costs_k_heads_however_many_there_are(k):
    experts = 7
    graph, params = nnx.split(make(experts, k))
    given = Context.of(B, L)
    jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graph, p)(x, given, True)[0])(params, tokens())
    count = B * L
    projections = 2 * count * D * I * (k + k + 2)  # queries, outputs; one key and one value
    attention = 2 * 2 * B * k * L * L * I
    assert count_flops(jaxpr) == 2 * count * D * experts + projections + attention
    # No expert of an MoE layer among them: these are what every token costs.
    assert count_flops(jaxpr, grouped=False) == count_flops(jaxpr)


def test_the_router_learns_from_the_task_with_one_head_and_every_parameter_has_a_gradient():
    """The denominator is a constant, so the logit of a weight of 1 still has a gradient."""
    graph, params = nnx.split(make(5, 1))

    def loss(params, x_BLD):
        y_BLD, *_ = nnx.merge(graph, params)(x_BLD, context(), True)
        return jnp.sum(jnp.where(VALID[..., None], jnp.sin(3 * y_BLD), 0))

    grads = jax.jit(jax.grad(loss))(params, tokens())
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-4, path


def test_router_losses_have_finite_gradients_when_padding_holds_nan():
    graph, params = nnx.split(make())
    x_BLD = jnp.where(VALID[..., None], tokens(), jnp.nan)

    def loss(params, x_BLD):
        return sum(nnx.merge(graph, params)(x_BLD, context(), True)[1].losses.values())

    by_params, by_x = jax.jit(jax.grad(loss, (0, 1)))(params, x_BLD)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_params))
    assert np.isfinite(by_x).all() and (by_x[~VALID] == 0).all()


def test_choosing_more_heads_per_token_than_exist_is_an_error():
    with pytest.raises(ValueError, match="k=3 must be at most experts=2"):
        make(2, 3)
