"""Means, quantiles and similarities."""

import math

import numpy as np
import pytest

from moejax.analysis.statistics.similarity import between
from moejax.analysis.statistics.spread import spread


def test_quantiles_are_interpolated_and_float16_does_not_round_the_mean():
    value = spread(np.array([1, 2, 3, 10], np.float16), (0.0, 0.5, 1.0))
    assert (value.mean, value.quantiles) == (4.0, (1.0, 2.5, 10.0))
    assert spread(np.full(5000, 3, np.float16), ()).mean == 3.0


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf, 1.0]])
def test_tokens_without_a_value_leave_none(values):
    value = spread(np.array(values), (0.1, 0.9))
    assert math.isnan(value.mean) and all(map(math.isnan, value.quantiles))


def test_the_similarity_of_experts_leaves_out_that_of_each_to_itself():
    similar = np.array([[[1, 0.5], [0.5, 1]], [[1, -0.25], [-0.25, 1]]], np.float32)
    assert between(similar).tolist() == [0.5, -0.25]
    assert np.isnan(between(np.ones((1, 1))))
