"""Finding 1 on routers whose answer is known."""

import math

import numpy as np
import pytest

from moejax.contrib.openmoe import tokens as finding
from moejax.contrib.openmoe.tokens import DOMAIN, POSITION, PREVIOUS, TOKEN
from moejax.record.counts import NONE, choice_counts
from tests.contrib.openmoe.routings import E, L, N, V, routed, tokens


def random_experts(shape, seed=1):
    return np.random.default_rng(seed).integers(0, E, shape)


def test_the_largest_spreads_are_those_of_openmoes_axis():
    """32 experts: 0.174 for one expert a token, 0.121 for two halves."""
    assert finding.largest_spread(32) == pytest.approx(np.std([1] + [0] * 31))
    assert finding.largest_spread(32) == pytest.approx(0.1740, abs=5e-5)
    assert finding.largest_spread(32, 2) == pytest.approx(np.std([0.5, 0.5] + [0] * 30))
    assert finding.largest_spread(32, 2) == pytest.approx(0.1210, abs=5e-5)


def test_counts_equal_those_of_a_loop_and_leave_out_inactive_columns():
    rng = np.random.default_rng(2)
    choice_TK, kind_T = rng.integers(NONE, E, (50, 2)), rng.integers(0, 3, 50)
    expected = np.zeros((3, E), int)
    for kind, choices in zip(kind_T, choice_TK, strict=True):
        for expert in choices:
            if expert != NONE:
                expected[kind, expert] += 1
    np.testing.assert_array_equal(choice_counts(choice_TK, kind_T, 3, E), expected)


def test_only_kinds_with_more_than_128_occurrences_count():
    kind_T = np.repeat([0, 1, 2], [128, 129, 500])
    expert_T1 = np.zeros((757, 1), int)
    spread = finding.spread_of(expert_T1, kind_T, E)
    assert spread.kinds == 2 and spread.mean == pytest.approx(np.std([1, 0, 0, 0]))
    # With one expert for all tokens, shuffled kinds look the same.
    assert spread.excess == pytest.approx(0)


def test_the_first_choice_is_the_one_of_largest_weight():
    weight = np.array([[[[0.2, 0.7], [0.0, 0.0], [0.6, 0.3]]]])
    found = routed(np.zeros((1, 3), int), [[[[1, 2], [3, 0], [0, 3]]]], weight=weight)
    np.testing.assert_array_equal(found.first(0), [[2, NONE, 0]])
    np.testing.assert_array_equal(found.choices(0), [[[1, 2], [NONE, NONE], [0, 3]]])


def test_a_router_of_token_ids_reaches_the_largest_spread_and_information():
    token_NL = tokens()
    found = finding.specialisation(routed(token_NL, token_NL % E))
    layer = found.layers[0]
    assert layer.first[TOKEN].kinds == V
    assert layer.first[TOKEN].mean == pytest.approx(layer.first[TOKEN].largest)
    assert layer.first[TOKEN].largest == pytest.approx(math.sqrt(3) / 4)
    assert layer.information[TOKEN] == pytest.approx(1)
    assert found.information[TOKEN].value == pytest.approx(1)
    for context in (PREVIOUS, POSITION):
        assert abs(layer.information[context]) < 0.02
    assert found.lead.low > 0.9


def test_the_spread_of_two_choices_is_relative_to_its_own_largest_value():
    token_NL = tokens()
    expert = np.stack([token_NL % E, (token_NL + 1) % E], axis=-1)[None]
    layer = finding.specialisation(routed(token_NL, expert)).layers[0]
    both = layer.shares[TOKEN]
    assert both.mean == pytest.approx(both.largest)
    assert both.largest == pytest.approx(np.std([0.5, 0.5, 0, 0]))
    assert layer.first[TOKEN].mean == pytest.approx(np.std([1, 0, 0, 0]))


def test_a_random_router_is_at_chance_in_everything():
    token_NL = tokens()
    label_NL = (np.arange(N) % 2)[:, None] * np.ones((1, L), int)
    found = finding.specialisation(
        routed(token_NL, random_experts((N, L)), label_NL=label_NL, names=("a", "b"))
    )
    for kind in (TOKEN, PREVIOUS, DOMAIN):
        spread = found.layers[0].first[kind]
        assert spread.mean <= 1.5 * spread.chance_high and abs(spread.excess) < 0.02
    for interval in found.information.values():
        assert interval.low < 0.01 and abs(interval.value) < 0.02
    assert abs(found.lead.value) < 0.02


@pytest.mark.parametrize("kind", [POSITION, PREVIOUS, DOMAIN])
def test_a_router_of_one_context_is_explained_by_that_context(kind):
    token_NL = tokens(rows=200)
    label_NL = np.random.default_rng(3).integers(0, E, token_NL.shape)
    kinds = finding.kinds_of(routed(token_NL, token_NL, label_NL=label_NL, names=tuple("abcd")))
    found = finding.specialisation(
        routed(token_NL, kinds[kind] % E, label_NL=label_NL, names=tuple("abcd"))
    )
    assert found.information[kind].value == pytest.approx(1)
    assert abs(found.information[TOKEN].value) < 0.02 and found.lead.high < -0.9


def test_information_equals_that_of_the_joint_distribution():
    """Against the definition, term by term."""
    kind_T = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    expert_T = np.array([0, 0, 1, 1, 1, 1, 0, NONE])
    joint = np.array([[2, 1], [1, 3]]) / 7
    product = joint.sum(1, keepdims=True) * joint.sum(0)
    told, chance, whole = finding.information(expert_T, kind_T)
    assert told == pytest.approx(np.sum(joint * np.log(joint / product)))
    assert whole == pytest.approx(-np.sum(joint.sum(0) * np.log(joint.sum(0))))
    assert 0 < chance < whole


def test_the_previous_token_comes_from_the_same_row():
    token_NL = np.array([[4, 5], [2, 3]])
    found = finding.kinds_of(routed(token_NL, token_NL))
    np.testing.assert_array_equal(found[PREVIOUS], [[0, 5], [0, 3]])
    np.testing.assert_array_equal(found[POSITION], [[0, 1], [0, 1]])


def test_tokens_without_a_choice_do_not_count():
    token_NL = tokens()
    weight = np.ones((1, N, L, 1))
    weight[:, :, ::2] = 0
    expert = np.where(np.arange(L) % 2, token_NL % E, 0)
    found = finding.specialisation(routed(token_NL, expert, weight=weight))
    assert found.layers[0].information[TOKEN] == pytest.approx(1)
