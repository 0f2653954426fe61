"""Finding 3 on routings whose drops are known."""

import numpy as np
import pytest

from moejax.contrib.openmoe.drops import Arm, drops, rise
from tests.contrib.openmoe.routings import E, first_come, routed, tokens

ARM = Arm(1.25)
ROWS, LENGTH = 40, 64


def skewed(seed=0, columns=1, favourite=0.7):
    """Experts [1, N, L, K] of which the first is wanted far more often than its share."""
    rng = np.random.default_rng(seed)
    share = [favourite, *[(1 - favourite) / (E - 1)] * (E - 1)]
    score = rng.gumbel(size=(1, ROWS, LENGTH, E)) + np.log(share)
    return np.argsort(-score, axis=-1)[..., :columns]


def measured(expert, capacity, **options):
    token_NL = tokens(rows=ROWS, length=LENGTH)
    kept = first_come(expert, capacity, **options)
    return drops("text", ARM, routed(token_NL, expert, kept=kept))


@pytest.mark.parametrize("columns", [1, 2])
def test_first_come_slots_on_a_skewed_routing_drop_more_and_more(columns):
    expert = skewed(columns=columns)
    found = measured(expert, int(1.25 * LENGTH * columns / E))
    assert found.k == columns and found.choices[0] == 0
    assert found.early.value == 0 and found.late.value > 0.3 and found.late.low > found.early.high
    assert found.rise.low > 0.3
    thirds = [np.mean(part) for part in np.array_split(found.choices, 3)]
    assert thirds == sorted(thirds) and thirds[2] > thirds[0]


def test_slots_by_priority_drop_as_much_but_everywhere():
    expert = skewed()
    score = np.random.default_rng(1).random((1, ROWS, LENGTH))
    capacity = int(1.25 * LENGTH / E)
    by_score = measured(expert, capacity, order="gate", priority_MNL=score)
    assert by_score.rate.value == pytest.approx(measured(expert, capacity).rate.value)
    assert by_score.rise.low < 0 < by_score.rise.high


def test_with_room_for_all_nothing_is_dropped():
    found = measured(skewed(), LENGTH)
    assert found.rate.value == found.rise.value == 0 and set(found.choices) == {0.0}


def test_tokens_with_any_and_with_all_choices_dropped_are_counted():
    """One layer, rows of two tokens with two choices: (both kept), (second dropped), ..."""
    kept = np.array([[[True, True], [True, False]], [[False, False], [False, True]]])
    kept = np.repeat(kept, 10, axis=0)[None]
    expert = np.broadcast_to([0, 1], kept.shape)
    found = drops("text", ARM, routed(np.zeros((20, 2), int), expert, kept=kept))
    assert found.choices == [0.5, 0.5] and found.rate.value == 0.5
    assert found.any == [0.5, 1.0] and found.all == [0.5, 0.0]


def test_inactive_choices_are_neither_wanted_nor_dropped():
    weight = np.zeros((1, 20, 3, 2))
    weight[:, :, 0, 0] = weight[:, :, 2] = 1  # one choice, none, two
    kept = np.zeros((1, 20, 3, 2), bool)
    kept[:, :, 2, 0] = True
    found = drops(
        "text", ARM, routed(np.zeros((20, 3), int), np.zeros((1, 20, 3, 2), int),
        weight=weight, kept=kept),
    )  # fmt: skip
    np.testing.assert_equal(found.choices, [1.0, np.nan, 0.5])
    np.testing.assert_equal(found.all, [1.0, np.nan, 0.0])
    assert found.rate.value == pytest.approx(2 / 3)


def test_the_rise_equals_that_of_the_line_fitted_by_numpy():
    rng = np.random.default_rng(2)
    lost_L, wanted_L = rng.random(9), rng.integers(1, 5, 9).astype(float)
    place_L = np.arange(9)
    slope = np.polyfit(place_L, lost_L / wanted_L, 1, w=np.sqrt(wanted_L))[0]
    assert rise(lost_L, wanted_L) == pytest.approx(8 * slope)


def test_every_arm_has_a_name():
    names = [Arm(0.0).name, Arm(1.0).name, Arm(1.25, "gate").name, Arm(1.25, k=1).name]
    assert names == [
        "dropless", "first come, 1 x mean load", "batch-prioritised, 1.25 x mean load",
        "first come, 1.25 x mean load, k=1",
    ]  # fmt: skip
