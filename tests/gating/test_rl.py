"""RL-R: the estimator is unbiased, learns a bandit, and trains through the trainer's hook."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from moejax import gating
from moejax.losses import policy_gradient
from moejax.train.metrics.rows import train_row
from moejax.types import Context, GateSpec
from tests import steps

D, E = 4, 3


def call(gate, params, x, key, train=True):
    return gate(params, (), x, Context.of(*x.shape[:2], key=key).grouped(1, train))


def drawn(gate, seed=1):
    params = gate.init(jax.random.key(seed), GateSpec(D, E))
    params["router_DE"] = jax.random.normal(jax.random.key(seed), (D, E))
    return params | {"baseline": jnp.float32(0.4)}


@pytest.mark.slow
def test_the_estimate_is_unbiased():
    """Mean of 20 000 estimates against the exact gradient of the expected reward."""
    gate = gating.make("rl")
    params, reward_E = drawn(gate), jnp.asarray([1.0, -0.5, 0.2])
    x = jax.random.normal(jax.random.key(2), (1, 5, D))
    valid = jnp.asarray([[True, True, True, True, False]])

    def sampled(params, key):
        out = call(gate, params, x, key)
        reward_GT = reward_E[out.routing.expert_GTK[..., 0]]
        stacked = jax.tree.map(lambda a: a[None], out.policy)
        return policy_gradient(stacked, reward_GT, valid)["policy"]

    def exact(params):
        expected_GT = jax.nn.softmax(x @ params["router_DE"]) @ reward_E
        return -jnp.sum(jnp.where(valid, expected_GT, 0)) / 4

    keys = jax.random.split(jax.random.key(3), 20_000)
    grads = jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(params, keys)["router_DE"]
    wanted = jax.grad(exact)(params)["router_DE"]
    error = np.std(grads, axis=0) / np.sqrt(len(keys))
    assert (np.abs(grads.mean(0) - wanted) < 4 * error).all()
    assert (np.abs(wanted) > 10 * error).any(), "the gradient stands out of the noise"


def test_routing_is_sampled_in_training_and_greedy_in_evaluation():
    gate = gating.make("rl")
    params = drawn(gate)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (D,)), (1, 5000, D))
    probs = jax.nn.softmax(x[0, 0] @ params["router_DE"])
    out = call(gate, params, x, jax.random.key(0))
    counts = np.bincount(out.routing.expert_GTK.ravel(), minlength=E)
    # 4 standard deviations of a share of 5000 draws.
    np.testing.assert_allclose(counts / 5000, probs, atol=4 * 0.5 / np.sqrt(5000))
    assert out.policy is not None
    got = jnp.exp(out.policy.log_prob_GT[0])
    np.testing.assert_allclose(got, probs[out.routing.expert_GTK[0, :, 0]], rtol=1e-5)
    held_out = call(gate, params, x, None, train=False)
    assert (held_out.routing.expert_GTK == probs.argmax()).all() and held_out.policy is None
    assert (out.routing.weight_GTK == 1).all() and (held_out.routing.weight_GTK == 1).all()


@pytest.mark.slow
def test_a_bandit_is_learned_with_its_baseline():
    """Each kind of token has its own best expert; only rewards reveal it."""
    gate = gating.make("rl")
    kinds = jnp.eye(D)
    best_D = jnp.asarray([2, 0, 1, 0])
    x = kinds[jax.random.randint(jax.random.key(1), (4, 16), 0, D)]
    best_GT = best_D[jnp.argmax(x, -1)]
    adam = optax.adam(0.05)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            out = call(gate, params, x, key)
            reward_GT = jnp.where(out.routing.expert_GTK[..., 0] == best_GT, -1.0, -3.0)
            stacked = jax.tree.map(lambda a: a[None], out.policy)
            learned = policy_gradient(stacked, reward_GT, jnp.ones(reward_GT.shape, bool))
            return sum(learned.values()) + sum(out.losses.values())

        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = gate.init(jax.random.key(0), GateSpec(D, E))
    before = call(gate, params, kinds[None], None, train=False).routing.expert_GTK[0, :, 0]
    state = adam.init(params)
    for key in jax.random.split(jax.random.key(2), 200):
        params, state = step(params, state, key)
    after = call(gate, params, kinds[None], jax.random.key(3), train=False)
    np.testing.assert_array_equal(after.routing.expert_GTK[0, :, 0], best_D)
    assert (before != best_D).any()
    # Rewards are -1 nearly always by now; the entropy bonus keeps a few others.
    value = kinds @ params["baseline_D"] + params["baseline"]
    np.testing.assert_allclose(value, -1, atol=0.3)


def test_the_entropy_bonus_lowers_the_loss_by_its_weight_times_the_mean_entropy():
    gate = gating.make("rl", entropy_weight=0.25)
    params = drawn(gate)
    x = jax.random.normal(jax.random.key(2), (2, 4, D))
    valid = jnp.asarray([[True] * 4, [True, False, False, False]])
    known = Context.of(2, 4, key=jax.random.key(0), valid_BL=valid).grouped(1, True)
    probs = np.asarray(jax.nn.softmax(x @ params["router_DE"]), np.float64)
    wanted = -0.25 * np.mean(scipy.stats.entropy(probs[np.asarray(valid)], axis=-1))
    losses = jax.jit(lambda x: gate(params, (), x, known).losses)(x)
    np.testing.assert_allclose(losses["rl_entropy"], wanted, rtol=1e-5)  # float32


def test_the_baseline_learns_without_a_gradient_to_the_tokens():
    gate = gating.make("rl")
    params = drawn(gate) | {"baseline_D": jnp.ones(D)}
    x = jax.random.normal(jax.random.key(2), (1, 3, D))

    def baseline(params, x):
        policy = call(gate, params, x, jax.random.key(0)).policy
        assert policy is not None
        return jnp.sum(policy.baseline_GT)

    by_params, by_x = jax.jit(jax.grad(baseline, (0, 1)))(params, x)
    np.testing.assert_array_equal(by_x, 0.0)
    np.testing.assert_allclose(by_params["baseline_D"], x[0].sum(0), rtol=1e-6)
    assert by_params["baseline"] == 3 and not by_params["router_DE"].any()


@pytest.mark.slow
def test_the_trainer_weights_the_policy_losses_and_updates_router_and_baseline():
    run = steps.make({"data": 1}, "rl", model__num_layers=1)
    weights = run.config.moe.losses
    assert weights.policy > 0 and weights.baseline > 0
    with jax.set_mesh(run.mesh):
        state = run.init_state()
        start = jax.device_get(state.params["periods"]["blocks"]["0"]["ffn"]["router"])
        for step in range(2):
            state, metrics = run.train_step(state, run.put(steps.batch(step)))
            row = train_row(step + 1, metrics, "")
            own = {name.removeprefix("aux/"): v for name, v in row.items() if "aux/" in name}
            assert {"policy", "baseline", "rl_entropy"} <= own.keys()
            # Reward and baseline both start near -log 64, which is -4.2: their difference is small.
            assert 0 < row["aux/baseline"] < np.log(64) ** 2 / 4
            assert 0 > row["aux/rl_entropy"] > -0.01 * np.log(8) - 1e-6
            known = dict(weights)
            total = row["loss"] + sum(known.get(name, 1.0) * value for name, value in own.items())
            np.testing.assert_allclose(row["total_loss"], total, rtol=1e-5)
    end = jax.device_get(state.params["periods"]["blocks"]["0"]["ffn"]["router"])
    for name in start:
        assert (start[name] != end[name]).any(), name


def test_a_negative_entropy_bonus_is_refused():
    with pytest.raises(ValueError, match="entropy_weight"):
        gating.make("rl", entropy_weight=-0.1).check(E, train=True)
