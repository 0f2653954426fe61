"""Counts and losses of a layer, worked out by hand on six tokens, one of them padding."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.routing_stats import (
    collect_stats,
    router_losses,
    sum_over_groups,
    with_cuts,
    with_tasks,
)
from moejax.types import RouterStats, Routing

VALID = jnp.asarray([[True, True, True], [True, True, False]])
ROUTING = Routing(
    jnp.asarray([[[0, 1], [0, 2], [1, 0]], [[2, 0], [1, 2], [0, 1]]], jnp.int32),
    # The second token has one pair, the fifth none.
    jnp.asarray([[[0.6, 0.4], [1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]]),
)
KEPT = jnp.asarray(
    [[[True, False], [True, True], [False, False]], [[True, True], [True, True], [True, True]]]
)
PROBS = jnp.asarray(
    [
        [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]],
        [[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.9, 0.05, 0.05]],
    ]
)


def stats():
    return collect_stats(ROUTING, PROBS, KEPT, VALID)


def test_pairs_are_counted_by_expert_position_and_column_and_unserved_tokens_too():
    found = stats()
    assert found.tokens == 5
    np.testing.assert_array_equal(found.load_E, [4, 2, 1])
    np.testing.assert_array_equal(found.dropped_E, [1, 2, 0])
    np.testing.assert_array_equal(found.dropped_L, [1, 0, 2])
    np.testing.assert_array_equal(found.dropped_K, [1, 2])
    assert found.unserved_tokens == 2, "the third, both of whose pairs were dropped, and the fifth"


@pytest.mark.parametrize(
    ("weight", "kept", "unserved"),
    [
        ([0.5, 0.5], [True, False], 0),
        ([0.5, 0.5], [False, False], 1),
        ([0.0, 0.0], [True, True], 1),
    ],
)
def test_a_token_is_served_if_one_of_its_pairs_was_kept(weight, kept, unserved):
    routing = Routing(jnp.asarray([[[0, 1]]], jnp.int32), jnp.asarray([[weight]]))
    valid = jnp.asarray([[True]])
    found = collect_stats(routing, jnp.full((1, 1, 2), 0.5), jnp.asarray([[kept]]), valid)
    assert found.unserved_tokens == unserved


def test_probabilities_and_entropies_are_summed_over_valid_tokens():
    found = stats()
    np.testing.assert_array_equal(found.prob_E, [2.25, 1.25, 1.5])
    np.testing.assert_allclose(found.entropy, 4 * math.log(2), rtol=1e-6)  # 1.5 + 0 + 1.5 + 0 + 1


def test_pairs_cut_by_a_gate_count_as_wanted_and_dropped():
    cut = jnp.zeros((2, 3, 3), bool).at[0, 1, 1].set(True).at[1, 0, 1].set(True)
    found, before = with_cuts(stats(), cut), stats()
    np.testing.assert_array_equal(found.load_E, [4, 4, 1])
    np.testing.assert_array_equal(found.dropped_E, [1, 4, 0])
    np.testing.assert_array_equal(found.dropped_L, [2, 1, 2])
    changed = {
        field.name
        for field in dataclasses.fields(found)
        if not np.array_equal(getattr(found, field.name), getattr(before, field.name))
    }
    assert changed == {"load_E", "dropped_E", "dropped_L"}


def test_the_load_of_a_task_counts_its_own_sequences_only():
    found = with_tasks(stats(), ROUTING, jnp.asarray([1, 0]), num_tasks=2)
    np.testing.assert_array_equal(found.load_ME, [[1, 0, 1], [3, 2, 0]])


def test_group_means_are_weighted_by_their_valid_tokens():
    found = sum_over_groups(
        {"one": jnp.asarray([1.0, 10.0]), "two": jnp.asarray([[1.0, 2.0], [3.0, 4.0]])}, VALID
    )
    assert found["one"] == 3 * 1 + 2 * 10
    np.testing.assert_array_equal(found["two"], [3 * 1 + 2 * 3, 3 * 2 + 2 * 4])


def test_losses_are_means_over_sequences_weighted_by_their_valid_tokens():
    load = jnp.asarray(
        [
            [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
            [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0]],
        ]
    )
    logits = jnp.zeros((2, 3, 3)).at[1, 2].set(100.0)
    found = router_losses(ROUTING, RouterStats(logits, PROBS, load), VALID)
    # Of three and of two tokens: 3 sum f P, and 3 times the sum of squared shares.
    wanted = {
        "load_balance": (3 * (0.6 * 1.75 + 0.4 * 0.75) + 2 * 3 * (0.5 * 0.25 + 0.5 * 0.5)) / 5,
        "importance": (3 * 3 * (0.7**2 + 0.3**2) + 2 * 3 * (0.5**2 + 0.5**2)) / 5,
        "load": (3 * 3 * (4 / 9 + 1 / 9) + 2 * 3 * (0.5**2 + 0.5**2)) / 5,
        "z": math.log(3) ** 2,
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)  # float32
