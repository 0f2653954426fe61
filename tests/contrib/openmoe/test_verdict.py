"""Verdicts by the stated criteria."""

import dataclasses

import numpy as np
import pytest

from moejax.contrib.openmoe.drops import Arm, drops
from moejax.contrib.openmoe.early import Early, StepComparison, early
from moejax.contrib.openmoe.tokens import specialisation
from moejax.contrib.openmoe.verdict import (
    ABSENT,
    APPEARS,
    UNKNOWN,
    drops_verdict,
    early_verdict,
    specialisation_verdict,
)
from tests.contrib.openmoe.routings import E, first_come, routed, tokens

ROWS, LENGTH = 200, 16


@pytest.fixture(scope="module")
def token_NL():
    return tokens(rows=ROWS, length=LENGTH)


def judged(token_NL, expert_NL):
    return specialisation_verdict(specialisation(routed(token_NL, expert_NL)))


def test_a_router_of_token_ids_specialises(token_NL):
    verdict = judged(token_NL, token_NL % E)
    assert verdict.answer == APPEARS
    assert str(verdict).startswith("context-independent specialisation: appears. Shares of")
    assert "tells 100.0% of its first expert" in verdict.because


def test_a_router_of_positions_and_a_random_router_do_not_specialise(token_NL):
    places = np.broadcast_to(np.arange(LENGTH), token_NL.shape) % E
    assert judged(token_NL, places).answer == ABSENT
    # A single id and single position: whatever the router does, it is chance.
    same = np.zeros((ROWS, 1), int)
    assert judged(same, np.random.default_rng(0).integers(0, E, same.shape)).answer == ABSENT


def test_a_router_of_ids_and_positions_cannot_be_judged(token_NL):
    """Ids spread most, but not twice as much as positions."""
    random = np.random.default_rng(1).random(token_NL.shape)
    places = np.broadcast_to(np.arange(LENGTH), token_NL.shape)
    assert judged(token_NL, np.where(random < 0.55, token_NL, places) % E).answer == UNKNOWN


def test_too_few_occurrences_are_not_judged(token_NL):
    few = tokens(rows=20, length=4)
    assert "use more --rows" in judged(few, few % E).because
    long = tokens(rows=40, length=64)
    verdict = judged(long, long % E)
    assert verdict.answer == UNKNOWN and "more than 128 --rows" in verdict.because


def found_early(cosine, others=0.4, steps=(0, 10, 20, 100)):
    then = [
        StepComparison(step, [0.8], [0.7], [1.0 if step == steps[-1] else cosine]) for step in steps
    ]
    return Early(then, steps[-1], "the recorded probe", 1000, 5, [0.1], [others])


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        (found_early(0.95), APPEARS),
        (found_early(0.85), ABSENT),
        (found_early(0.95, others=0.93), ABSENT),  # as alike as any two ids
        (found_early(0.95, steps=(0, 30, 100)), UNKNOWN),  # nothing of the first fifth
        (dataclasses.replace(found_early(0.95), kinds=0), UNKNOWN),
    ],
)
def test_early_routing_learning_needs_the_last_shares_by_a_fifth_of_the_steps(found, answer):
    assert early_verdict(found).answer == answer


def test_the_verdict_names_the_recording_nearest_to_a_fifth_of_the_steps(token_NL):
    recording = routed(token_NL, token_NL % E)
    found = early([(step, recording) for step in (0, 10, 20, 30, 100)], "checkpoints")
    assert "At step 20 of 100" in early_verdict(found).because


def measured(text, favourite, capacity=10, seed=0):
    """First-come drops, and batch-prioritised ones, of a router with a favourite expert."""
    rng = np.random.default_rng(seed)
    share = [favourite, *[(1 - favourite) / (E - 1)] * (E - 1)]
    expert = rng.choice(E, (1, 40, 32, 1), p=share)
    token_NL, score = tokens(rows=40), rng.random((1, 40, 32))
    position = first_come(expert, capacity)
    by_score = first_come(expert, capacity, order="gate", priority_MNL=score)
    return [
        drops(text, Arm(1.25), routed(token_NL, expert, kept=position)),
        drops(text, Arm(1.25, "gate"), routed(token_NL, expert, kept=by_score)),
    ]


def test_drops_rise_towards_the_end_and_more_so_out_of_domain():
    verdict = drops_verdict([*measured("held out", 0.5), *measured("english", 0.9)])
    assert verdict.answer == APPEARS and "in the last quarter (more)" in verdict.because


def test_drops_that_rise_only_on_another_text_are_out_of_domain():
    verdict = drops_verdict([*measured("held out", 0.25, 32), *measured("english", 0.9)])
    assert verdict.answer == "appears out of domain only"


def test_a_part_of_the_held_out_text_is_not_out_of_domain():
    """The verdict mentions it, and is that of the whole texts."""
    flat = [*measured("held out", 0.25, 32), *measured("english", 0.25, 32)]
    part = measured("held out, mostly code", 0.9)
    verdict = drops_verdict([*flat, *part])
    assert verdict.answer == drops_verdict(flat).answer == ABSENT
    assert "held out, mostly code: " in verdict.because


def test_without_drops_the_third_finding_does_not_appear():
    assert drops_verdict(measured("held out", 0.9, capacity=32)).answer == ABSENT
