"""Balance losses against published numbers, other libraries' formulas and their own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import losses
from moejax.gating import load_probability
from moejax.types import Policy

# The router probabilities of V-MoE's routing_test.py, with its published loss values.
VMOE_PROBS = jnp.asarray([[[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]])
ALL = jnp.ones((1, 4), bool)


def one_column(expert_U, num_scopes=1):
    expert = jnp.asarray(expert_U, jnp.int32).reshape(num_scopes, -1, 1)
    return expert, jnp.ones(expert.shape, jnp.float32)


def balance(expert, weight, probs, valid):
    load = losses.expert_load(expert, weight, probs.shape[-1])
    return losses.load_balance(load, probs, valid)


def test_load_balance_gives_the_gshard_loss_published_with_vmoe():
    expert, weight = one_column(jnp.argmax(VMOE_PROBS, -1))
    value = balance(expert, weight, VMOE_PROBS, ALL)
    np.testing.assert_allclose(value, 1.0875, rtol=1e-6)  # float32 sums of 4 numbers


def test_importance_equals_one_plus_the_value_published_with_vmoe():
    mass = jnp.sum(VMOE_PROBS, axis=1)
    value = losses.squared_share(mass, ALL)
    # The published number is a float32 CV^2; subtracting 1 costs its last digit.
    np.testing.assert_allclose(value - 1, 0.03874999, atol=2e-7)


def test_load_equals_one_plus_the_value_published_with_vmoe():
    logits = np.array([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = np.array([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]])
    threshold = np.sort(logits + noise, axis=-1)[:, 1:2]  # V-MoE: the k-th noisy value, k = 2
    probability = 1 - scipy.stats.norm.cdf((threshold - logits) / 0.1)
    value = losses.squared_share(jnp.asarray(probability.sum(0))[None], jnp.ones((1, 3), bool))
    np.testing.assert_allclose(value - 1, 0.48573864536489236, atol=1e-6)


def test_load_balance_gives_the_value_published_with_flaxformer():
    with jax.threefry_partitionable(False):  # the random bits of the time of its publication
        key = jax.random.PRNGKey(0)
        probs = jax.random.uniform(key, (5, 2), minval=0, maxval=1)
        expert = jax.random.randint(key, (5, 1), minval=0, maxval=2)
    value = balance(expert[None], jnp.ones((1, 5, 1)), probs[None], jnp.ones((1, 5), bool))
    np.testing.assert_allclose(value, 0.8741045, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_value_of_other_libraries_equals_ours_times_their_scale(k):
    """Each formula written out as its library has it; docs/losses.md prints these factors."""
    rng = np.random.default_rng(0)
    tokens, num_experts = 64, 6
    logits = rng.normal(size=(tokens, num_experts))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[:, :k]
    mask = np.zeros((tokens, num_experts))
    np.put_along_axis(mask, chosen, 1.0, axis=1)
    hugging_face = num_experts * (mask.mean(0) * probs.mean(0)).sum()
    megatron = (probs.sum(0) * mask.sum(0) * num_experts / (tokens * k * tokens)).sum()
    maxtext = (mask.mean(0) * probs.mean(0)).mean() * num_experts**2
    flaxformer = (mask.mean(0) * probs.mean(0)).mean() * num_experts**2
    ours = float(
        balance(
            jnp.asarray(chosen, jnp.int32)[None],
            jnp.ones((1, tokens, k)),
            jnp.asarray(probs, jnp.float32)[None],
            jnp.ones((1, tokens), bool),
        )
    )
    np.testing.assert_allclose(
        [hugging_face, megatron, maxtext, flaxformer],
        [k * ours, ours, k * ours, k * ours],
        rtol=1e-6,
    )


@pytest.mark.parametrize("num_experts", [1, 2, 5, 8])
@pytest.mark.parametrize("k", [1, 2])
def test_every_balance_loss_is_one_at_perfect_balance(num_experts, k):
    tokens = 4 * num_experts
    first = jnp.arange(tokens) % num_experts
    expert = jnp.stack([(first + i) % num_experts for i in range(k)], -1)[None]
    weight = jnp.full(expert.shape, 1.0 / k)
    probs = jnp.full((1, tokens, num_experts), 1.0 / num_experts)
    valid = jnp.ones((1, tokens), bool)
    mass = losses.expert_mass(expert, weight, num_experts)
    np.testing.assert_allclose(balance(expert, weight, probs, valid), 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses.squared_share(mass, valid), 1.0, rtol=1e-6)


def test_load_balance_is_the_number_of_experts_when_one_takes_everything():
    probs = jnp.zeros((1, 4, 8)).at[..., 3].set(1.0)
    expert, weight = one_column([3, 3, 3, 3])
    np.testing.assert_allclose(balance(expert, weight, probs, ALL), 8.0, rtol=1e-6)


def test_load_balance_gradient_is_zero_at_balance_and_pushes_away_from_the_busy_expert():
    def loss(logits):
        expert, weight = one_column([0, 0, 0, 1])
        return balance(expert, weight, jax.nn.softmax(logits), ALL)

    gradient = jax.grad(loss)(jnp.zeros((1, 4, 2)))
    assert (gradient[..., 0] > 0).all() and (gradient[..., 1] < 0).all()

    def balanced(logits):
        expert, weight = one_column([0, 1, 0, 1])
        return balance(expert, weight, jax.nn.softmax(logits), ALL)

    np.testing.assert_allclose(jax.grad(balanced)(jnp.zeros((1, 4, 2))), 0.0, atol=1e-7)


@pytest.mark.parametrize("poison", [50.0, np.nan])
def test_padding_changes_no_loss(poison):
    rng = jax.random.key(1)
    logits = jax.random.normal(rng, (2, 6, 4))
    valid = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    poisoned = jnp.where(valid[..., None], logits, poison)

    def values(logits):
        probs = jax.nn.softmax(logits)
        weight, expert = jax.lax.top_k(probs, 2)
        weight = jnp.where(valid[..., None], weight, 0.0)
        mass = losses.expert_mass(expert, weight, 4)
        return jnp.stack(
            [
                balance(expert, weight, probs, valid),
                losses.squared_share(mass, valid),
                losses.z_loss(logits, valid),
            ]
        )

    np.testing.assert_array_equal(values(logits), values(poisoned))


def test_a_padded_scope_has_the_losses_of_its_valid_tokens_alone():
    expert, weight = one_column(jnp.argmax(VMOE_PROBS, -1))
    behind = ((0, 0), (0, 3), (0, 0))
    valid = jnp.pad(ALL, behind[:2])
    longer, weights, probs = (jnp.pad(x, behind) for x in (expert, weight, VMOE_PROBS))
    alone = balance(expert, weight, VMOE_PROBS, ALL)
    np.testing.assert_allclose(balance(longer, weights, probs, valid), alone, rtol=1e-6)
    z_loss = losses.z_loss(jnp.pad(VMOE_PROBS, behind), valid)
    np.testing.assert_allclose(z_loss, losses.z_loss(VMOE_PROBS, ALL), rtol=1e-6)


def test_a_share_does_not_depend_on_the_size_of_the_mass():
    mass = jnp.sum(VMOE_PROBS, axis=1)
    small = losses.squared_share(1e-3 * mass, ALL)
    np.testing.assert_allclose(small, losses.squared_share(mass, ALL), rtol=1e-5)


def test_z_loss_equals_the_value_published_with_flaxformer():
    with jax.threefry_partitionable(False):  # the random bits of the time of its publication
        logits = jax.random.uniform(jax.random.PRNGKey(0), (2, 6, 4), minval=-5, maxval=5)
    value = losses.z_loss(logits, jnp.ones((2, 6), bool))
    np.testing.assert_allclose(value, 13.786719, rtol=1e-6)  # its last digit is float32's


def test_z_loss_equals_the_mean_square_log_partition():
    logits = np.random.default_rng(2).normal(size=(2, 5, 3)).astype(np.float32)
    expected = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    value = losses.z_loss(jnp.asarray(logits), jnp.ones((2, 5), bool))
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # float32 exp and log


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=4, max_size=4),
    st.integers(0, 2**16),
)
def test_token_weighted_micro_batches_give_the_loss_of_the_batch(valid_tokens, seed):
    """Sequence scope: any split of the sequences, with padding of any length."""
    logits = jax.random.normal(jax.random.key(seed), (4, 6, 3))
    valid = jnp.arange(6) < jnp.asarray(valid_tokens)[:, None]

    def values(part):
        probs = jax.nn.softmax(logits[part])
        expert, weight = one_column(jnp.argmax(logits[part], -1), probs.shape[0])
        weight = jnp.where(valid[part][..., None], weight, 0.0)
        tokens = valid[part].sum()
        return (
            balance(expert, weight, probs, valid[part]) * tokens,
            losses.z_loss(logits[part], valid[part]) * tokens,
        )

    whole = values(slice(0, 4))
    halves = jax.tree.map(jnp.add, values(slice(0, 2)), values(slice(2, 4)))
    np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-6)  # sums in another order


def test_the_policy_losses_are_means_over_layers_and_valid_tokens():
    """By hand: advantages are (1, -2) and (0, 3); the third token is padding."""
    policy = Policy(
        log_prob_GT=jnp.asarray([[[-1.0, -0.5, -9.0]], [[-2.0, -0.25, -9.0]]]),
        baseline_GT=jnp.asarray([[[-2.0, -1.0, 7.0]], [[-1.0, -6.0, 7.0]]]),
    )
    reward_BL = jnp.asarray([[-1.0, -3.0, 100.0]])
    valid_BL = jnp.asarray([[True, True, False]])
    found = losses.policy_gradient(policy, reward_BL, valid_BL)
    # -(1 * -1 + -2 * -0.5 + 0 * -2 + 3 * -0.25) / 4 and (1 + 4 + 0 + 9) / 4.
    assert found == {"policy": 0.1875, "baseline": 3.5}


def test_the_balance_loss_has_no_gradient_through_its_counts():
    load, probs = jnp.asarray([[3.0, 1.0, 0.0]]), VMOE_PROBS
    assert losses.load_balance(load, probs, ALL) > 1, "other counts would have another loss"
    np.testing.assert_array_equal(jax.grad(losses.load_balance)(load, probs, ALL), 0.0)


def test_reward_and_baseline_are_constants_to_the_policy_and_the_reward_to_both():
    policy = Policy(jnp.full((1, 1, 2), -1.0), jnp.full((1, 1, 2), 0.5))
    valid, reward = jnp.ones((1, 2), bool), jnp.asarray([[2.0, 3.0]])

    def of(name):
        def value(policy, reward):
            return losses.policy_gradient(policy, reward, valid)[name]

        return jax.grad(value, (0, 1))(policy, reward)

    moved, by_reward = of("policy")
    np.testing.assert_array_equal(moved.log_prob_GT, [[[-0.75, -1.25]]])
    np.testing.assert_array_equal(moved.baseline_GT, 0.0)
    moved, also_by_reward = of("baseline")
    np.testing.assert_array_equal(moved.baseline_GT, [[[-1.5, -2.5]]])
    np.testing.assert_array_equal(moved.log_prob_GT, 0.0)
    np.testing.assert_array_equal([by_reward, also_by_reward], 0.0)


def test_shazeer_load_is_the_frequency_of_selection_under_redrawn_noise():
    """Monte Carlo: redraw the noise of one expert, count how often it is among the top k."""
    k, draws = 2, 200_000
    rng = np.random.default_rng(3)
    clean = np.array([0.3, 0.1, -0.2, 0.5], np.float32)
    std = np.array([0.5, 0.8, 1.0, 0.3], np.float32)
    noisy = (clean + rng.normal(size=4) * std).astype(np.float32)
    predicted = load_probability(jnp.asarray(clean), jnp.asarray(noisy), jnp.asarray(std), k)
    for expert in range(4):
        others = np.delete(noisy, expert)
        redrawn = clean[expert] + rng.normal(size=draws) * std[expert]
        frequency = np.mean(redrawn > np.sort(others)[-k])
        deviation = np.sqrt(frequency * (1 - frequency) / draws) + 1e-4
        assert abs(frequency - predicted[expert]) < 4 * deviation
