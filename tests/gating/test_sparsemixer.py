"""SparseMixer: transformers' function and its gradient, the distribution of samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.gating.sparsemixer import best_of, estimated_weight, near_best, weight_among
from moejax.types import Context, GateSpec

E = 6


def routed(gate, logits_TE, train=False, seed=0):
    """The gate's routing of one sequence, with the identity as its router."""
    x_GTD = jnp.asarray(logits_TE, jnp.float32)[None]
    key = jax.random.key(seed)
    context = Context.of(*x_GTD.shape[:2], key=key).grouped(1, train)
    out = gate({"router_DE": jnp.eye(x_GTD.shape[-1])}, (), x_GTD, context)
    return np.asarray(out.routing.expert_GTK[0]), np.asarray(out.routing.weight_GTK[0])


def drawn(tokens=200, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=(tokens, E))).astype(np.float32)


def near(free, logits, jitter):
    """The experts of a round, in plain words: {expert: probability}."""
    best = max(logits[e] for e in free)
    kept = [e for e in free if best - logits[e] <= 2 * jitter * max(abs(logits[e]), best)]
    total = sum(np.exp(logits[e] - best) for e in kept)
    return {e: np.exp(logits[e] - best) / total for e in kept}


@pytest.mark.parametrize("jitter", [0.0, 0.1, 1.0])
def test_evaluation_takes_the_best_of_each_round_with_its_share_of_those_nearby(jitter):
    logits = drawn(40).astype(np.float64)
    expert, weight = routed(gating.make("sparsemixer", k=3, jitter=jitter), logits)
    for t, row in enumerate(logits):
        free = set(range(E))
        for j in range(3):
            probs = near(free, row, jitter)
            best = max(probs, key=lambda e: row[e])
            assert expert[t, j] == best
            # float32 exponentials of a sum of at most six.
            np.testing.assert_allclose(weight[t, j], probs[best], rtol=1e-6)
            free.remove(best)


def test_training_draws_pairs_of_experts_by_the_probabilities_of_the_two_rounds():
    logits, tokens, jitter = np.array([1.0, 0.9, 0.65, 0.8, -2.0, 0.7]), 20_000, 0.16
    gate = gating.make("sparsemixer", jitter=jitter)
    expert, weight = routed(gate, np.tile(logits, (tokens, 1)), train=True)
    statistic, cells = 0.0, 0
    for first, second in itertools.permutations(range(E), 2):
        p = near(set(range(E)), logits, jitter).get(first, 0.0)
        q = near(set(range(E)) - {first}, logits, jitter).get(second, 0.0)
        seen = (expert == (first, second)).all(-1)
        if not p * q:
            assert not seen.any(), "an expert far from the best is never drawn"
            continue
        statistic += (seen.sum() - tokens * p * q) ** 2 / (tokens * p * q)
        cells += 1
        best = max(near(set(range(E)) - {first}, logits, jitter), key=lambda e: logits[e])
        whole = np.isclose(weight[seen, 1], q, rtol=1e-5)
        third = np.isclose(weight[seen, 1], q / 3, rtol=1e-5)
        assert (whole | third).all()
        share = 1.0 if second == best else 0.25
        # Five standard deviations of a share among those seen.
        assert abs(whole.mean() - share) <= 5 * np.sqrt(share * (1 - share) / seen.sum())
    # Chi-square with cells - 1 degrees of freedom has mean cells - 1 and variance twice that.
    assert cells == 13 and statistic < cells - 1 + 5 * np.sqrt(2 * (cells - 1))


def test_a_third_of_the_weight_has_the_gradient_of_the_whole():
    logits = jnp.asarray(drawn(30))
    mask = near_best(logits, jnp.ones(logits.shape, bool), 0.5)
    expert = best_of(jnp.asarray(drawn(30, seed=1)), mask)

    def total(whole):
        whole = jnp.full(expert.shape, whole)
        return jax.value_and_grad(lambda h: estimated_weight(h, mask, expert, whole).sum())(logits)

    (value, slope), (third, same) = total(True), total(False)
    np.testing.assert_allclose(third, value / 3, rtol=1e-6)
    np.testing.assert_array_equal(slope, same)
    plain = jax.grad(lambda h: weight_among(h, mask, expert).sum())(logits)
    np.testing.assert_array_equal(slope, plain)
    assert np.abs(slope).max() > 0.1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_router_learns_from_the_task(k):
    gate = gating.make("sparsemixer", k=k)
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))
    params = gate.init(jax.random.key(1), GateSpec(8, E))
    context = Context.of(2, 16, key=jax.random.key(2)).grouped(1, True)
    value = jax.random.normal(jax.random.key(3), (E,))

    def loss(params):
        routing = gate(params, (), x, context).routing
        return (routing.weight_GTK * value[routing.expert_GTK]).sum()

    slope = jax.grad(loss)(params)["router_DE"]
    assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-3


@pytest.mark.parametrize("jitter", [-0.1, 1.5])
def test_a_jitter_out_of_range_is_refused(jitter):
    with pytest.raises(ValueError, match=rf"gate.jitter={jitter} must lie in \[0, 1\]"):
        gating.make("sparsemixer", jitter=jitter).check(E, False)


def test_a_jitter_of_zero_evaluates_but_does_not_train():
    gate = gating.make("sparsemixer", jitter=0.0)
    gate.check(E, False)
    with pytest.raises(ValueError, match=r"the router gets no gradient; use gate.jitter=0.1"):
        gate.check(E, True)


@pytest.mark.slow
@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_evaluation_equals_that_of_transformers(jitter, scale):
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits = drawn(2000, scale)
    weight, expert = phimoe.sparsemixer(torch.tensor(logits), jitter, training=False)
    got_expert, got_weight = routed(gating.make("sparsemixer", jitter=jitter), logits)
    np.testing.assert_array_equal(got_expert, expert.numpy())
    # float32 exponentials of numbers up to 1.
    np.testing.assert_allclose(got_weight, weight.numpy(), atol=1e-6)


@pytest.mark.slow
def test_the_gradient_equals_that_of_transformers():
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits, tokens = drawn(500), 500
    mask = near_best(jnp.asarray(logits), jnp.ones(logits.shape, bool), 0.3)
    expert = best_of(jnp.asarray(drawn(tokens, seed=1)), mask)
    rng = np.random.default_rng(2)
    whole, outside = rng.random((tokens, 1)) < 0.5, rng.normal(size=(tokens, 1))
    outside = outside.astype(np.float32)

    scores = torch.tensor(logits, requires_grad=True)
    probs = torch.softmax(scores.masked_fill(~torch.tensor(np.asarray(mask)), -torch.inf), -1)
    chosen = torch.tensor(np.asarray(expert), dtype=torch.int64)
    factor = torch.tensor(np.where(whole, 1.0, 1 / 3).astype(np.float32))
    theirs = phimoe.PhimoeMultiplier.apply(
        scores, probs.gather(-1, chosen).detach(), chosen, probs.detach(), factor
    )
    theirs.backward(torch.tensor(outside))

    weight, back = jax.vjp(
        lambda h: estimated_weight(h, mask, expert, jnp.asarray(whole)), jnp.asarray(logits)
    )
    (slope,) = back(jnp.asarray(outside))
    np.testing.assert_allclose(weight, theirs.detach().numpy(), atol=1e-6)
    assert scores.grad is not None
    # Products of three numbers of order 1 in float32.
    np.testing.assert_allclose(slope, scores.grad.numpy(), atol=1e-6)
