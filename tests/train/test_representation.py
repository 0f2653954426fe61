"""Collapse and participation of a layer's inputs, against their definitions and known cases."""

import math

import numpy as np
import pytest

from moejax.train.probe.representation import collapse, participation

T, D, E = 400, 6, 4


def clusters(seed=0, tokens=T, apart=2.0):
    """Tokens around one point per expert, as float32, and whose they are; expert 2 has few."""
    rng = np.random.default_rng(seed)
    expert_T = rng.choice(E, tokens, p=[0.4, 0.3, 0.02, 0.28])
    centre_ED = apart * rng.normal(size=(E, D))
    spread_D = 1 + np.arange(D)
    x_TD = centre_ED[expert_T] + spread_D * rng.normal(size=(tokens, D))
    return x_TD.astype(np.float32), expert_T


def by_definition(x_TD, expert_T):
    """Token by token, with the pseudo-inverse of the whole matrix."""
    x_TD = x_TD.astype(np.float64)
    mean = {e: x_TD[expert_T == e].mean(0) for e in set(expert_T)}
    away_TD = [x - mean[e] for x, e in zip(x_TD, expert_T, strict=True)]
    within = np.mean([np.outer(x, x) for x in away_TD], 0)
    middle = x_TD.mean(0)
    between = np.mean([np.outer(mean[e] - middle, mean[e] - middle) for e in expert_T], 0)
    return np.trace(within @ np.linalg.pinv(between, rcond=1e-10, hermitian=True))


@pytest.mark.parametrize("seed", range(3))
def test_collapse_is_the_trace_of_within_times_pseudo_inverse_of_between(seed):
    x_TD, expert_T = clusters(seed)
    wanted = by_definition(x_TD, expert_T)
    assert collapse(x_TD, expert_T) == pytest.approx(wanted, rel=1e-8)


def test_collapse_of_two_experts_on_a_line_is_the_ratio_of_the_variances():
    # Means -1 and 1, deviations of 0.5 both ways: variance 0.25 within, 1 between.
    x_TD = np.array([[-1.5], [-0.5], [0.5], [1.5]], np.float32)
    expert_T = np.array([5, 5, 7, 7])
    assert collapse(x_TD, expert_T) == pytest.approx(0.25)
    in_one_point = np.sign(x_TD)
    assert collapse(in_one_point, expert_T) == pytest.approx(0, abs=1e-12)


def test_collapse_falls_as_experts_separate_and_ignores_scale_and_origin():
    near, middle, far = (collapse(*clusters(apart=apart)) for apart in (0.5, 2.0, 8.0))
    assert near > 5 * middle > 25 * far > 0
    x_TD, expert_T = clusters()
    moved = (8.0 * x_TD + 16.0).astype(np.float32)
    assert collapse(moved, expert_T) == pytest.approx(middle, rel=1e-4)  # rounded to float32


def test_collapse_is_nan_without_two_distinct_experts():
    x_TD, expert_T = clusters()
    assert math.isnan(collapse(x_TD, np.zeros(T, int)))
    assert math.isnan(collapse(np.ones((4, D), np.float32), np.array([0, 0, 1, 1])))
    assert math.isnan(collapse(x_TD[:0], expert_T[:0]))
    x_TD[3, 2] = np.nan
    assert math.isnan(collapse(x_TD, expert_T))


@pytest.mark.parametrize("tokens", [T, D - 2])
def test_participation_equals_the_formula_in_the_covariances_eigenvalues(tokens):
    x_TD, _ = clusters(tokens=tokens)
    value_D = np.linalg.eigvalsh(np.cov(x_TD.astype(np.float64), rowvar=False))
    wanted = value_D.sum() ** 2 / np.sum(value_D**2)
    assert participation(x_TD) == pytest.approx(wanted, rel=1e-5)  # float32


def test_participation_is_the_width_for_a_round_cloud_and_one_for_a_line_or_a_point():
    rng = np.random.default_rng(0)
    # The expected value is D / (1 + (D + 1) / T), from the moments of a Wishart matrix.
    round_TD = rng.normal(size=(20_000, 16)).astype(np.float32)
    assert participation(round_TD) == pytest.approx(16, rel=0.01)
    line_TD = (np.arange(50)[:, None] * rng.normal(size=16)).astype(np.float32)
    assert participation(line_TD) == pytest.approx(1, rel=1e-5)
    assert participation(np.ones((50, 16), np.float32)) == 1
