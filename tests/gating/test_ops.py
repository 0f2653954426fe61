"""Router arithmetic that gates share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.gating import ops, top_k_routing
from moejax.types import Context


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**16), st.data())
def test_top_k_routing_agrees_with_a_stable_numpy_sort(num_experts, seed, data):
    k = data.draw(st.integers(1, num_experts))
    # Small integers make ties common.
    logits = np.random.default_rng(seed).integers(0, 4, size=(7, num_experts)).astype(np.float32)
    expert, weight = top_k_routing(jnp.asarray(logits), k)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(expert, expected)
    np.testing.assert_allclose(weight, np.take_along_axis(probs, expected, 1), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_softmax_after_top_k_equals_renormalised_softmax(k):
    """Mixtral's order of operations and OLMoE's with norm_topk_prob give one result."""
    logits = jax.random.normal(jax.random.key(0), (50, 5)) * 3
    _, before = top_k_routing(logits, k)
    _, after = top_k_routing(logits, k, renormalize=True)
    np.testing.assert_allclose(after, before / before.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(after.sum(-1), 1.0, rtol=1e-6)


def test_sigmoid_scores_are_taken_per_expert():
    logits = jnp.asarray([[2.0, -1.0, 0.5]])
    expert, weight = top_k_routing(logits, 2, score="sigmoid")
    np.testing.assert_array_equal(expert, [[0, 2]])
    np.testing.assert_allclose(weight, 1 / (1 + np.exp([[-2.0, -0.5]])), rtol=1e-6)
    _, shared = top_k_routing(logits, 2, score="sigmoid", renormalize=True)
    np.testing.assert_allclose(shared, weight / weight.sum(), rtol=1e-6)


def test_top_k_routing_is_float32_for_bfloat16_logits_and_survives_large_ones():
    logits = jnp.asarray([[300.0, 100.0, -300.0]], jnp.bfloat16)
    expert, weight = top_k_routing(logits, 2)
    assert weight.dtype == jnp.float32 and expert.dtype == jnp.int32
    np.testing.assert_allclose(weight, [[1.0, 0.0]], atol=1e-30)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_weight_that_underflows_keeps_its_pair_and_has_a_finite_gradient(score, renormalize):
    logits = jnp.asarray([[200.0, 0.0, -50.0, -100.0], [-200.0, -240.0, -400.0, -500.0]])

    def weights(logits):
        return top_k_routing(logits, 2, score=score, renormalize=renormalize)[1]

    weight = np.asarray(weights(logits))
    assert (weight > 0).all() and np.isfinite(weight).all()
    assert jnp.isfinite(jax.jacobian(weights)(logits)).all()
    if renormalize:
        np.testing.assert_allclose(weight.sum(-1), 1.0, rtol=1e-6)
    if (score, renormalize) == ("sigmoid", True):
        # sigmoid(-200) : sigmoid(-240) is e^40 : 1, although both underflow.
        np.testing.assert_allclose(weight[1, 1], np.exp(-40.0), rtol=1e-4)  # float32 of 240


def test_a_logit_of_minus_infinity_excludes_an_expert():
    for renormalize in (True, False):
        _, weight = top_k_routing(jnp.asarray([1.0, -jnp.inf]), 2, renormalize=renormalize)
        np.testing.assert_array_equal(weight, [1.0, 0.0])


@pytest.mark.parametrize(("k", "score"), [(0, "softmax"), (4, "softmax"), (1, "relu")])
def test_top_k_routing_refuses_invalid_arguments(k, score):
    with pytest.raises(ValueError, match="must lie in|is unknown"):
        top_k_routing(jnp.zeros((2, 3)), k, score=score)


def test_means_are_over_the_valid_tokens_and_0_where_there_are_none():
    value_GT = jnp.asarray([[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 7.0, 8.0], [9.0, 9.0, 9.0, 9.0]])
    valid_GT = jnp.asarray([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(ops.group_mean(value_GT, valid_GT), [1.5, 6.0, 0.0])
    for rows, wanted in ((3, (1.0 + 2.0 + 6.0) / 3), (0, 0.0)):
        known = {"valid_BL": valid_GT & (jnp.arange(3) < rows)[:, None]}
        assert ops.mean(value_GT, Context.of(3, 4, **known).grouped(1, True)) == wanted


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", [(), (3,)])
def test_padding_does_not_change_the_draws_of_valid_tokens(shape):
    """One row, padded on the left, behind and in between."""
    valid = np.zeros((3, 12), bool)
    valid[0, :8], valid[1, 4:], valid[2, [0, 2, 3, 5, 6, 7, 9, 11]] = True, True, True
    known = {"row_B": jnp.full(3, 5), "key": jax.random.key(2)}
    for draw in (jax.random.normal, jax.random.uniform, jax.random.gumbel):
        given = Context.of(3, 12, valid_BL=jnp.asarray(valid), **known).grouped(1, True)
        alone = Context.of(1, 8, row_B=jnp.array([5]), key=known["key"]).grouped(1, True)
        noise, wanted = (ops.row_noise(draw, c, shape) for c in (given, alone))
        assert len(np.unique(wanted)) == wanted.size
        for row in range(3):
            np.testing.assert_array_equal(noise[row][valid[row]], wanted[0])
