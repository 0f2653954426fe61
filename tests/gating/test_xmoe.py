"""The cosine router: Tutel's formula, its invariances, its clamp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.types import Context, GateSpec

G, T, D, E = 2, 10, 6, 8


def drawn(gate, seed=1):
    params = gate.init(jax.random.key(seed), GateSpec(D, E))
    if gate.bias:
        params["bias_R"] = jax.random.normal(jax.random.key(2), params["bias_R"].shape)
    return params


def tokens():
    return jax.random.normal(jax.random.key(0), (G, T, D))


def call(gate, params, x=None, train=False):
    x = tokens() if x is None else x
    return gate(params, (), x, Context.of(*x.shape[:2]).grouped(1, train))


def tutel(params, x, clamp=0.01):
    """Normalised projection times normalised centroids times exp(min(theta, log(1 / clamp)))."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    token = np.asarray(x, np.float64) @ p["project_DR"] + p.get("bias_R", 0.0)
    token /= np.maximum(np.linalg.norm(token, axis=-1, keepdims=True), 1e-12)
    centroid = p["centroid_RE"]
    centroid /= np.maximum(np.linalg.norm(centroid, axis=0, keepdims=True), 1e-12)
    return token @ centroid * np.exp(min(p["log_scale"], np.log(1 / clamp)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("theta", [np.log(2), 3.0, 9.0])
def test_logits_and_weights_are_those_of_tutel(bias, theta):
    gate = gating.make("xmoe", k=2, bias=bias, rank=5)
    params = drawn(gate) | {"log_scale": jnp.float32(theta)}
    out, wanted = call(gate, params), tutel(params, tokens())
    # float32 products and rsqrt; the scale is at most 100.
    np.testing.assert_allclose(out.stats.logits_GTE, wanted, atol=1e-6 * np.exp(min(theta, 4.61)))
    probs = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
    best = np.argsort(-wanted, axis=-1)[..., :2]
    np.testing.assert_array_equal(out.routing.expert_GTK, best)
    np.testing.assert_allclose(
        out.routing.weight_GTK, np.take_along_axis(probs, best, -1), rtol=2e-4, atol=1e-30
    )


def test_it_starts_with_the_given_temperature_and_half_as_many_dimensions_as_experts():
    gate = gating.make("xmoe", temperature=0.3)
    params = drawn(gate)
    assert params["project_DR"].shape == (D, E // 2) and params["centroid_RE"].shape == (E // 2, E)
    np.testing.assert_allclose(call(gate, params).means["temperature"], 0.3, rtol=1e-6)
    assert np.abs(call(gate, params).stats.logits_GTE).max() <= 1 / 0.3


@pytest.mark.parametrize("factor", [1e-2, 7.0, 1e4])
def test_lengths_of_tokens_and_centroids_do_not_matter(factor):
    gate = gating.make("xmoe", k=3)
    params, wanted = drawn(gate), call(gate, drawn(gate))
    scale_E = factor ** jnp.linspace(0.1, 1, E)
    other = params | {"centroid_RE": params["centroid_RE"] * scale_E}
    for out in (call(gate, params, factor * tokens()), call(gate, other)):
        np.testing.assert_array_equal(out.routing.expert_GTK, wanted.routing.expert_GTK)
        np.testing.assert_allclose(out.stats.logits_GTE, wanted.stats.logits_GTE, atol=2e-6)


def test_the_temperature_stops_falling_at_its_bound():
    gate = gating.make("xmoe", min_temperature=0.1)
    params = drawn(gate)

    def loss(theta):
        out = call(gate, params | {"log_scale": theta})
        return jnp.sum(jnp.square(out.stats.logits_GTE)), out.means["temperature"][0]

    for theta, bounded in ((1.0, False), (5.0, True)):
        slope, temperature = jax.grad(loss, has_aux=True)(jnp.float32(theta))
        np.testing.assert_allclose(temperature, 0.1 if bounded else np.exp(-1.0), rtol=1e-6)
        assert (slope == 0) == bounded


def test_a_token_of_zeros_has_equal_cosines_and_a_finite_gradient():
    gate = gating.make("xmoe")
    x = tokens().at[0, 0].set(0)
    np.testing.assert_array_equal(call(gate, drawn(gate), x).stats.logits_GTE[0, 0], 0)
    grads = jax.grad(lambda p, x: jnp.sum(call(gate, p, x).routing.weight_GTK[0, 1:]), (0, 1))(
        drawn(gate), x
    )
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "fields",
    [{"rank": 1}, {"rank": -2}, {"temperature": 0.001}, {"min_temperature": 0.0}, {"k": 9}],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        gating.make("xmoe", **fields).check(E, train=True)


def test_one_renormalised_expert_is_refused_in_training():
    gate = gating.make("xmoe", renormalize=True)
    gate.check(E, train=False)
    with pytest.raises(ValueError, match="the same constant weight"):
        gate.check(E, train=True)
