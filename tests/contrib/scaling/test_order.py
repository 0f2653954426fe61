"""The order of routers by loss, and cells where it is within the noise of seeds."""

import math

import numpy as np
import pytest
import scipy.stats

from moejax.contrib.scaling.order import comparisons, exceptions, rankings, seed_deviation
from moejax.contrib.scaling.runs import DENSE, Run


def cell(experts: int, **losses: list[float]) -> list[Run]:
    return [
        Run(router, 1e6, experts, seed, loss)
        for router, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_cells_rank_the_routers_they_all_have_by_mean_loss():
    runs = cell(2, a=[2.0, 2.2], b=[2.05]) + cell(4, a=[1.9], b=[1.8]) + cell(8, a=[1.0])
    runs += [Run(DENSE, 1e6, 1, 0, 3.0), *cell(1, a=[3.0], b=[2.0])]
    found = rankings(runs, ["a", "b"])
    assert [(r.cell, r.order) for r in found] == [((1e6, 2), ("b", "a")), ((1e6, 4), ("b", "a"))]
    assert exceptions(found, ["b", "a"]) == [] and exceptions(found, ["a", "b"]) == found


def test_common_seeds_are_compared_in_pairs_as_scipy_does():
    a, b = [2.0, 2.3, 2.1, 9.0], [2.06, 2.35, 2.19]
    (found,) = comparisons(cell(4, a=a, b=b), "a", "b")
    expected = scipy.stats.ttest_rel(a[:3], b).confidence_interval()
    assert found.seeds == 3 and found.mean == pytest.approx(np.mean(np.subtract(a[:3], b)))
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)
    assert found.sign == -1


def test_a_difference_within_the_seeds_scatter_has_no_sign():
    (found,) = comparisons(cell(4, a=[2.0, 2.3, 2.1], b=[2.3, 2.1, 2.2]), "a", "b")
    assert found.sign == 0
    (found,) = comparisons(cell(4, a=[2.3, 2.31], b=[2.0, 2.0]), "a", "b")
    assert found.sign == 1


def test_single_runs_are_compared_with_the_pooled_seed_deviation():
    dense = [Run(DENSE, 1e6, 1, seed, loss) for seed, loss in enumerate([3.0, 3.01, 3.05])]
    runs = [*dense, *cell(4, a=[2.0], b=[2.1]), *cell(8, a=[1.0, 1.02], b=[1.5])]
    noise, freedom = seed_deviation(runs)
    pooled = (2 * np.var([3.0, 3.01, 3.05], ddof=1) + np.var([1.0, 1.02], ddof=1)) / 3
    assert freedom == 3 and noise == pytest.approx(math.sqrt(pooled))
    reach = scipy.stats.t.ppf(0.975, 3) * math.sqrt(2 * pooled)
    for found in comparisons(runs, "a", "b"):
        assert found.seeds == 1 and found.half_width == pytest.approx(reach)


def test_without_a_second_seed_no_difference_is_certain():
    (found,) = comparisons(cell(4, a=[1.0], b=[2.0]), "a", "b")
    assert found.half_width == math.inf and found.sign == 0
