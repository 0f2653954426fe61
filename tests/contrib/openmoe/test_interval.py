"""Intervals over rows."""

import numpy as np
import pytest

from moejax.contrib.openmoe.interval import GROUPS, Interval, jackknife, over_rows


def test_the_interval_of_a_mean_is_students():
    """With as many rows as groups the jackknife of a mean has the textbook standard error."""
    scipy = pytest.importorskip("scipy.stats")
    value_N = np.random.default_rng(0).normal(size=GROUPS)
    found = over_rows(GROUPS, lambda row_n: float(value_N[row_n].mean()))
    low, high = scipy.t.interval(0.95, GROUPS - 1, loc=value_N.mean(), scale=scipy.sem(value_N))
    assert (found.value, found.low, found.high) == pytest.approx(
        (value_N.mean(), low, high), rel=1e-3
    )


def test_groups_are_neighbours_of_equal_size():
    seen = []
    over_rows(41, lambda row_n: float(seen.append(set(range(41)) - set(row_n.tolist())) or 0.0))
    without = seen[:-1]
    assert len(without) == GROUPS and set().union(*without) == set(range(41))
    for rows in without:
        assert sorted(rows) == list(range(min(rows), max(rows) + 1)) and len(rows) in (2, 3)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="19 rows"):
        over_rows(19, lambda row_n: 0.0)


def test_a_statistic_that_never_changes_has_no_width():
    assert jackknife(2.0, np.full(GROUPS, 2.0)) == Interval(2.0, 2.0, 2.0)
