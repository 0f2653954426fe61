"""The dense-to-sparse gate: its two limits, its schedule, its stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from moejax import gating
from moejax.types import Context

E = 6
LOGITS = np.array([1.0, 0.3, -0.5, 0.0, -2.0, 0.7])


def call(step=0, length=4000, train=True, **fields):
    """The gate on one token repeated, whose logits are given (router = identity)."""
    gate = gating.make("evomoe", **fields)
    x = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (2, length, E))
    context = Context.of(2, length, key=jax.random.key(0), step=jnp.int32(step))
    return gate({"router_DE": jnp.eye(E)}, (), x, context.grouped(1, train))


def softmax(h):
    return np.exp(h) / np.exp(h).sum()


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 1e-3, "min_temperature": 1e-3, "hard_step": -1}, {"hard_step": 0}],
    ids=["cold", "hard"],
)
def test_a_low_temperature_or_the_hard_stage_samples_one_expert_from_the_softmax(fields):
    weight = np.asarray(call(**fields).routing.weight_GTK).reshape(-1, E)
    active = weight > 0
    # At tau = 0.001 a second share passes 0.001 only where two noisy logits are within 0.007.
    assert (active.sum(-1) == 1).mean() > 0.98
    counts = active[active.sum(-1) == 1].sum(0)
    test = scipy.stats.chisquare(counts, softmax(LOGITS) * counts.sum())
    assert test.pvalue > 1e-3
    np.testing.assert_allclose(
        weight[active], np.broadcast_to(softmax(LOGITS), weight.shape)[active], rtol=1e-5
    )


def test_a_high_temperature_visits_all_experts_with_the_clean_softmax():
    out = call(temperature=1e4, min_temperature=1.0)
    np.testing.assert_allclose(
        out.routing.weight_GTK, np.broadcast_to(softmax(LOGITS), (2, 4000, E)), rtol=1e-5
    )


def test_the_share_of_visited_experts_equals_the_formula():
    """Redrawn in numpy: mean and its standard error from 100 000 samples and 8000."""
    tau, rng = 0.15, np.random.default_rng(0)
    noisy = (LOGITS + rng.gumbel(size=(100_000, E))) / tau
    share = np.exp(noisy - noisy.max(-1, keepdims=True))
    wanted = (share / share.sum(-1, keepdims=True) > 0.001).mean(0)
    out = call(temperature=tau, min_temperature=tau, hard_step=-1)
    got = (np.asarray(out.routing.weight_GTK) > 0).mean((0, 1))
    assert (np.abs(got - wanted) < 4 * np.sqrt(0.25 * (1 / 8000 + 1 / 100_000))).all()
    assert 1 < wanted.sum() < E - 1


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("exponential", [2.0, 2.0 * 0.25**0.3, 0.5, 0.5]), ("linear", [2.0, 1.55, 0.5, 0.5])],
)
def test_the_temperature_falls_as_scheduled(schedule, wanted):
    fields = {"temperature": 2.0, "min_temperature": 0.5, "temperature_steps": 10}
    got = [
        call(step, 2, True, schedule=schedule, **fields).means["temperature"][0]
        for step in (0, 3, 10, 99)
    ]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_many_experts_are_visited_before_the_hard_step_and_one_from_then_on():
    for step, hard in ((0, False), (6, False), (7, True), (50, True)):
        active = (call(step, 50, hard_step=7).routing.weight_GTK > 0).sum(-1)
        assert (active == 1).all() == hard


@pytest.mark.parametrize("fields", [{}, {"max_active": 2}, {"weights": "gumbel"}])
def test_evaluation_takes_the_best_expert_without_noise(fields):
    out = call(train=False, **fields)
    best = np.asarray(out.routing.weight_GTK) > 0
    assert (best.sum(-1) == 1).all()
    assert (np.asarray(out.routing.expert_GTK)[best] == 0).all()
    np.testing.assert_allclose(out.routing.weight_GTK[best], softmax(LOGITS)[0], rtol=1e-5)


def test_gumbel_weights_are_the_noisy_softmax():
    """At a high threshold nothing but the shares above it is left, and all shares add up to 1."""
    out = call(weights="gumbel", temperature=1.0, hard_step=-1, threshold=0.1)
    weight = np.asarray(out.routing.weight_GTK)
    assert weight[weight > 0].min() > 0.1 and weight.sum(-1).max() <= 1 + 1e-6
    every = call(weights="gumbel", temperature=1.0, hard_step=-1, threshold=0.0)
    np.testing.assert_allclose(every.routing.weight_GTK.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 0.2},
        {"temperature": 0.1},
        {"min_temperature": 0.0},
        {"temperature_steps": 0},
        {"schedule": "cosine"},
        {"weights": "hard"},
        {"hard_step": -2},
        {"max_active": 7},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=f"gate.{next(iter(fields))}"):
        gating.make("evomoe", **fields).check(E, train=True)
