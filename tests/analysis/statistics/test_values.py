"""Means, quantiles, histograms and similarities."""

import numpy as np
import pytest

from moejax.analysis.statistics.values import between, histogram, spread


def test_the_mean_comes_first_then_quantiles_interpolated():
    found = spread(np.array([[1, 2, 3, 10], [0, 0, 0, 4]], np.float32), (0.0, 0.5, 1.0))
    assert found.tolist() == [[4, 1, 2.5, 10], [1, 0, 0, 4]]


def test_float16_does_not_round_the_mean():
    assert spread(np.full(5000, 3, np.float16), ()).tolist() == [3.0]


def test_shares_of_a_histogram_are_of_all_tokens():
    found = histogram(np.array([0.0, 0.5, 1.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0]))
    assert found.tolist() == [2 / 5, 2 / 5]


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf, 1.0]])
def test_tokens_without_a_value_leave_none_in_their_layer_alone(values):
    assert np.isnan(spread(np.array(values), (0.1, 0.9))).all()
    both = spread(np.array([values, np.ones(len(values))]), (0.1, 0.9))
    assert np.isnan(both[0]).all() and (both[1] == 1).all() == bool(values)


def test_the_similarity_of_experts_leaves_out_that_of_each_to_itself():
    similar = np.array([[[1, 0.5], [0.5, 1]], [[1, -0.25], [-0.25, 1]]], np.float32)
    assert between(similar).tolist() == [0.5, -0.25]
    assert np.isnan(between(np.ones((1, 1))))
