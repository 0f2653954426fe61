"""The consistency loss: two passes and their divergence where it has a weight, one where not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from moejax import losses
from moejax.tasks.language.task import SECOND_PASS
from moejax.train.cost import flops
from tests import steps

WEIGHT = 0.7


@functools.cache
def made(gate, weight):
    changes = {"moe__losses__consistency": weight, "model__num_layers": 1}
    run = steps.make({"data": 1}, gate, **changes)
    return run, run.init_state()


def forward(gate, weight, *, train=True, jit=True):
    """A pass over a batch as a function of the key."""
    run, state = made(gate, weight)
    batch = jax.tree.map(jnp.asarray, steps.batch(0))

    def call(key):
        step = jnp.int32(0)
        return run.task.forward(state.params, state.gate_state, batch, step, key, train=train)

    return jax.jit(call) if jit else call


def one_pass(run, state, batch, key):
    """Totals and logits of a single pass, whatever the weights."""
    given = (state.params, state.gate_state, batch, jnp.int32(0), key)
    logits_BLV, aux = run.task.apply(*given, train=True)
    return run.task._totals(logits_BLV, aux, batch), logits_BLV


def symmetric(p_logits, q_logits, valid):
    """(KL(p | q) + KL(q | p)) / 2 by scipy, one token at a time."""
    total = 0.0
    for p, q in zip(p_logits[valid], q_logits[valid], strict=True):
        p, q = (scipy.special.softmax(np.asarray(h, np.float64)) for h in (p, q))
        total += (scipy.special.rel_entr(p, q).sum() + scipy.special.rel_entr(q, p).sum()) / 2
    return total / valid.sum()


def test_the_divergence_is_the_mean_symmetric_kl_over_valid_tokens():
    p, q = (jax.random.normal(jax.random.key(i), (2, 5, 7)) * 3 for i in (0, 1))
    valid = np.arange(5) < np.array([[5], [2]])
    got = losses.symmetric_kl(p, q, jnp.asarray(valid))
    np.testing.assert_allclose(got, symmetric(np.asarray(p), np.asarray(q), valid), rtol=1e-5)
    np.testing.assert_array_equal(losses.symmetric_kl(p, p, jnp.asarray(valid)), 0.0)
    assert losses.symmetric_kl(p, q, jnp.zeros((2, 5), bool)) == 0


def test_the_divergence_of_bfloat16_predictions_is_taken_in_float32():
    """Logits of 0 and 1, which bfloat16 holds exactly: (p - q) (log p - log q) = 0.4621 * 1."""
    p, q = jnp.asarray([[[0.0, 1.0]]], jnp.bfloat16), jnp.asarray([[[1.0, 0.0]]], jnp.bfloat16)
    wanted = symmetric(np.asarray(p, np.float64), np.asarray(q, np.float64), np.ones((1, 1), bool))
    assert abs(wanted - np.tanh(0.5)) < 1e-12
    for one, other in ((p, q), (p.astype(jnp.float32), q), (p, q.astype(jnp.float32))):
        got = losses.symmetric_kl(one, other, jnp.ones((1, 1), bool))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.slow
def test_two_passes_are_averaged_and_compared():
    """Against the two passes one by one, and scipy's divergence of their logits."""
    run, state = made("thor", WEIGHT)
    key, batch = jax.random.key(4), jax.tree.map(jnp.asarray, steps.batch(0))
    keys = [key, jax.random.fold_in(key, SECOND_PASS)]
    (first, p), (second, q) = map(jax.jit(functools.partial(one_pass, run, state, batch)), keys)
    both = forward("thor", WEIGHT)(key)
    assert first.stats is not None and second.stats is not None and both.stats is not None
    busy = [np.asarray(t.stats.load_E).argmax(-1) for t in (first, second)]
    assert (busy[0] != busy[1]).any(), "the passes draw different experts"
    wanted = symmetric(np.asarray(p), np.asarray(q), steps.batch(0)["valid"])
    # float32 against float64, and two programs.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    close(both.auxiliary["consistency"] / both.items, wanted)
    assert wanted > 1e-4
    close(both.loss, (first.loss + second.loss) / 2)
    close(both.mean_square, (first.mean_square + second.mean_square) / 2)
    assert both.items == first.items == batch["valid"].sum()
    np.testing.assert_array_equal(both.stats.load_E, first.stats.load_E)
    objective = run.task.objective(both, both.items)
    close(objective, both.loss / both.items + WEIGHT * wanted)


@pytest.mark.slow
def test_without_a_weight_and_in_evaluation_there_is_one_pass():
    """By the traced program itself, and by its FLOPs."""
    key = jax.random.key(0)
    traced = {
        (weight, train): jax.make_jaxpr(forward("top_k", weight, train=train, jit=False))(key)
        for weight in (0.0, WEIGHT)
        for train in (True, False)
    }
    run, state = made("top_k", 0.0)
    batch = jax.tree.map(jnp.asarray, steps.batch(0))
    alone = jax.make_jaxpr(lambda key: one_pass(run, state, batch, key)[0])(key)
    assert str(traced[0.0, True]) == str(alone)
    assert str(traced[0.0, False]) == str(traced[WEIGHT, False])
    one, two = (flops.count_flops(traced[weight, True]) for weight in (0.0, WEIGHT))
    assert two == 2 * one > 0


def test_a_gate_without_noise_agrees_with_itself():
    totals = forward("top_k", WEIGHT)(jax.random.key(0))
    np.testing.assert_allclose(totals.auxiliary["consistency"], 0.0, atol=1e-6)


@pytest.mark.slow
def test_thor_trains_with_its_preset():
    run = steps.make({"data": 1}, "thor", model__num_layers=1)
    assert run.config.moe.losses.consistency == 0.5
    with jax.set_mesh(run.mesh):
        state = run.init_state()
        for step in range(2):
            state, metrics = run.train_step(state, run.put(steps.batch(step)))
            totals = jax.device_get(metrics["totals"])
            assert totals.auxiliary["consistency"] > 0
            assert (np.sort(totals.stats.load_E, -1)[:, :-1] == 0).all(), "one expert a layer"
            assert np.isfinite(metrics["grad_norm"])
