"""The order of a mixture: whose turn it is, and which of its rows."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from moejax.data.batches import endless_order
from moejax.data.shares import Turns, apportioned, interleaved, mixed_order, seed_of

SHARES = {
    "halves": [Fraction(1, 2)] * 2,
    "tenths": [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)],
    "sevenths": [Fraction(1, 7), Fraction(2, 7), Fraction(4, 7)],
    "one": [Fraction(1)],
    "rare": [Fraction(1, 1000), Fraction(997, 1000), Fraction(2, 1000)],
    "many": [Fraction(i + 1, 210) for i in range(20)],
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
def test_every_prefix_has_the_shares_to_within_a_row_for_each_source(shares):
    turns, seen = Turns(shares), [0] * len(shares)
    for position in range(3000):
        source, before = turns.at(position)
        assert before == seen[source], "rows of a source come in the order of its own"
        seen[source] += 1
        assert turns.counts(position + 1) == tuple(seen)
        for count, share in zip(seen, shares, strict=True):
            assert abs(count - (position + 1) * share) < len(shares)


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
def test_a_whole_number_of_periods_has_the_shares_exactly(shares):
    period = np.lcm.reduce([share.denominator for share in shares])
    counts = Turns(shares).counts(int(period) * 10**12)
    assert counts == tuple(int(period * share) * 10**12 for share in shares)


def test_the_order_is_each_sources_own_endless_order_in_turns():
    """Two epochs of the smaller source and more, against Turns and ``endless_order``."""
    rows, shares, names = [40, 64], [Fraction(3, 4), Fraction(1, 4)], ["a", "b"]
    order = mixed_order(rows, shares, names, seed=5)
    own = [endless_order(n, seed_of(name, 5)) for n, name in zip(rows, names, strict=True)]
    turns, begins = Turns(shares), [0, 40]
    found = [order[i] for i in range(120)]
    for position, row in enumerate(found):
        source, index = turns.at(position)
        assert row == begins[source] + own[source][index]
    of_a = [row for row in found if row < 40]
    assert len(of_a) == 90
    assert sorted(of_a[:40]) == sorted(of_a[40:80]) == list(range(40))
    assert of_a[:40] != of_a[40:80], "every epoch has an order of its own"
    again = mixed_order(rows, shares, names, seed=5)
    assert [again[i] for i in (119, 7, 64)] == [found[i] for i in (119, 7, 64)]
    other = mixed_order(rows, shares, names, seed=6)
    assert [other[i] for i in range(120)] != found


def test_sources_of_as_many_rows_are_not_read_in_one_order():
    order = mixed_order([50, 50], [Fraction(1, 2)] * 2, ["a", "b"], seed=0)
    rows = [order[i] for i in range(100)]
    assert [row for row in rows if row < 50] != [row - 50 for row in rows if row >= 50]


def test_another_source_does_not_change_the_rows_of_those_before():
    three = mixed_order([50, 50, 50], [Fraction(1, 3)] * 3, ["a", "b", "c"], seed=0)
    two = mixed_order([50, 50], [Fraction(1, 2)] * 2, ["a", "b"], seed=0)
    of_a = [[order[i] for i in range(90) if order[i] < 50] for order in (three, two)]
    assert of_a[0] == of_a[1][:30]


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
@pytest.mark.parametrize("seats", [1, 2, 3, 20, 100, 1001])
def test_seats_are_apportioned_by_largest_remainder_and_each_gets_one(shares, seats):
    counts = apportioned(seats, shares)
    assert sum(counts) == seats and min(counts) >= (seats >= len(shares))
    if min(seats * share for share in shares) >= 1:
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - seats * share) < 1


def test_rows_of_sources_are_interleaved_evenly():
    source_N = interleaved([6, 3, 1, 0])
    assert Counter(source_N.tolist()) == {0: 6, 1: 3, 2: 1}
    for half in (source_N[:5], source_N[5:]):
        assert np.sum(half == 0) == 3 and np.sum(half == 1) in (1, 2)
