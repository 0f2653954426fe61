"""Hierarchical gates: the equivalent flat mixture, the published load, and the choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import moejax
from moejax import gating, reference
from moejax.types import Context, GateSpec, Routing

G, T, D, E = 2, 12, 6, 8


def drawn(gate, seed=1):
    params = gate.init(jax.random.key(0), GateSpec(D, E))
    keys = jax.random.split(jax.random.key(seed), len(params))
    return {
        name: jax.random.normal(key, params[name].shape)
        for name, key in zip(params, keys, strict=True)
    }


def tokens(seed=0):
    return jax.random.normal(jax.random.key(seed), (G, T, D))


def call(gate, params, train=False, **known):
    context = Context.of(G, T, key=jax.random.key(3), **known).grouped(1, train)
    return gate(params, (), tokens(), context)


def softmax(h):
    e = np.exp(h - h.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_level(params, groups):
    """p_i and p_{j|i} in numpy."""
    x = np.asarray(tokens(), np.float64)
    inner = (x @ np.asarray(params["inner_DE"])).reshape(G, T, groups, E // groups)
    return softmax(x @ np.asarray(params["outer_DA"])), softmax(inner)


@pytest.mark.slow
@pytest.mark.quick(1)
@pytest.mark.parametrize("groups", [1, 4])
def test_routing_densely_on_both_levels_equals_the_flat_mixture_of_the_product(groups):
    gate = gating.make("hierarchical", groups=groups, k_groups=groups, k=E // groups, noisy=False)
    layer = moejax.MoE(D, 8, E, gate=gate, transport="dropless", rngs=nnx.Rngs(0))
    params = drawn(gate)
    layer.router = nnx.data(jax.tree.map(nnx.Param, params))
    y, info = jax.jit(lambda x: layer(x))(tokens())
    outer, inner = by_level(params, groups)
    flat = (outer[..., None] * inner).reshape(G, T, E)
    all_GTE = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32), (G, T, E))
    wanted = reference.moe(
        tokens(),
        Routing(all_GTE, jnp.asarray(flat, jnp.float32)),
        layer.expert_weights(),
        "swiglu",
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)  # float32 sums of 8 products
    assert info.stats.load_E.sum() == G * T * E


def test_the_best_experts_of_the_best_groups_are_kept_and_each_level_renormalised():
    gate = gating.make("hierarchical", groups=2, k_groups=2, k=3)
    params = drawn(gate)
    outer, inner = by_level(params, 2)
    routing = call(gate, params).routing
    np.testing.assert_allclose(routing.weight_GTK.sum(-1), 1.0, rtol=1e-6)
    assert (np.diff(routing.weight_GTK, axis=-1) <= 0).all(), "heaviest first"
    for g in range(G):
        for t in range(T):
            wanted = {}
            for i in np.argsort(-outer[g, t])[:2]:
                best = np.argsort(-inner[g, t, i])[:3]
                kept = inner[g, t, i, best] / inner[g, t, i, best].sum()
                share = outer[g, t, i] / np.sort(outer[g, t])[-2:].sum()
                wanted |= {4 * i + j: share * w for j, w in zip(best, kept, strict=True)}
            got = dict(
                zip(
                    routing.expert_GTK[g, t].tolist(),
                    routing.weight_GTK[g, t].tolist(),
                    strict=True,
                )
            )
            assert got.keys() == wanted.keys()
            np.testing.assert_allclose([got[e] for e in wanted], list(wanted.values()), rtol=1e-5)


def test_a_token_visits_experts_of_k_groups_only():
    gate = gating.make("hierarchical", groups=4, k_groups=2, k=2)
    expert = np.asarray(call(gate, drawn(gate), train=True).routing.expert_GTK)
    groups = [set(row // 2) for row in expert.reshape(-1, 4)]
    assert all(len(seen) == 2 for seen in groups)
    assert len(set().union(*groups)) == 4, "and not all tokens those of the same"


def test_load_is_the_published_product_of_smooth_loads():
    """Loops over a group's tokens: load_i(H) sum_{t in X_i} P(j | i) / |X_i|, noise included."""
    groups, k_groups, k = 4, 2, 1
    gate = gating.Hierarchical(groups=groups, k_groups=k_groups, k=k)  # k = 1: as in evaluation
    params = drawn(gate)
    valid = jnp.arange(T) < jnp.asarray([[T], [T - 4]])
    out = call(gate, params, train=True, valid_BL=valid)
    x = np.asarray(tokens(), np.float64)
    spread = lambda name: np.log1p(np.exp(x @ np.asarray(params[name], np.float64))) + 0.01
    # The gate's own noise, drawn again: one number per group of experts, then per expert.
    from moejax.gating.ops import row_noise

    context = Context.of(G, T, key=jax.random.key(3)).grouped(1, True)
    noise = np.asarray(row_noise(jax.random.normal, context, (groups + E,)), np.float64)
    clean = [x @ np.asarray(params["outer_DA"]), x @ np.asarray(params["inner_DE"])]
    std = [spread("outer_noise_DA"), spread("inner_noise_DE")]
    noisy = [clean[0] + noise[..., :groups] * std[0], clean[1] + noise[..., groups:] * std[1]]

    def chance(clean, noisy, std, k):
        """P(each of these is among the k best) if only its own noise is drawn again."""
        return [
            scipy.stats.norm.cdf((clean[e] - np.sort(np.delete(noisy, e))[-k]) / std[e])
            for e in range(len(clean))
        ]

    for g in range(G):
        smooth, sent, within = np.zeros(groups), np.zeros(groups), np.zeros(E)
        for t in np.flatnonzero(valid[g]):
            smooth += chance(clean[0][g, t], noisy[0][g, t], std[0][g, t], k_groups)
            for i in np.argsort(-noisy[0][g, t])[:k_groups]:
                own = slice(i * E // groups, (i + 1) * E // groups)
                sent[i] += 1
                at = (g, t, own)
                within[own] += chance(clean[1][at], noisy[1][at], std[1][at], k)
        wanted = np.repeat(smooth / np.maximum(sent, 1), E // groups) * within
        got = jnp.where(valid[g][:, None], out.stats.load_GTE[g], 0).sum(0)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)  # float32 against float64
        assert (sent > 0).sum() >= 3


def test_probabilities_and_z_loss_logits_are_without_noise_even_in_training():
    gate = gating.make("hierarchical")
    params = drawn(gate)
    stats = jax.jit(lambda params: call(gate, params, train=True).stats)(params)
    outer, inner = by_level(params, 4)
    flat = (outer[..., None] * inner).reshape(G, T, E)
    np.testing.assert_allclose(stats.probs_GTE, flat, rtol=1e-4, atol=1e-6)  # float32 products
    x = np.asarray(tokens(), np.float64)
    h = np.repeat(x @ np.asarray(params["outer_DA"]), E // 4, axis=-1) + x @ params["inner_DE"]
    np.testing.assert_allclose(stats.logits_GTE, h, rtol=1e-5, atol=1e-5)


def test_routers_start_equal_and_noise_spreads_the_load():
    gate = gating.make("hierarchical")
    out = call(gate, gate.init(jax.random.key(0), GateSpec(D, E)), train=True)
    np.testing.assert_allclose(out.stats.probs_GTE, 1 / E, rtol=1e-6)
    assert np.bincount(np.asarray(out.routing.expert_GTK).ravel(), minlength=E).min() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 3}, "gate.groups=3 does not divide num_experts=8"),
        ({"groups": 0}, "gate.groups=0"),
        ({"k_groups": 5}, "gate.k_groups=5 must lie between 1 and 4"),
        ({"k": 3}, "gate.k=3 must lie between 1 and 2"),
        ({"k": 1}, "gate.k=1 gives this level the constant weight 1"),
        ({"k_groups": 1}, "gate.k_groups=1 gives this level"),
        ({"min_std": 0.0}, "min_std"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gating.make("hierarchical", **fields).check(E, train=True)
