"""The scaling law and its fit, compared with hand arithmetic and with SciPy."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize

from moejax.contrib.scaling.checks import arrays
from moejax.contrib.scaling.law import PUBLISHED, Law, fit_law, saturated, squared_error
from tests.contrib.scaling.sources import LAW, runs_of

NAMES = ("a", "b", "c", "d", "E_start", "E_max")


def test_saturated_experts_follow_the_formula_between_E_start_and_E_max():
    assert saturated(1, 2.0, 300.0) == pytest.approx(2.0)
    assert saturated(1e15, 2.0, 300.0) == pytest.approx(300.0)
    # 1/(1/1.5 - 1/6) = 2, so at E = 5: 1/(1/6 + 1/6) = 3.
    assert saturated(5, 1.5, 6.0) == pytest.approx(3.0)


def test_the_loss_follows_the_formula():
    law = Law(-0.1, -0.2, 0.01, 1.5, 1.5, 6.0)
    expected = 10 ** (-0.1 * 8 - 0.2 * math.log10(3) + 0.01 * 8 * math.log10(3) + 1.5)
    assert law.loss(1e8, 5) == pytest.approx(expected)


@pytest.mark.parametrize("law", [LAW, *PUBLISHED.values()], ids=["synthetic", *PUBLISHED])
def test_the_fit_recovers_coefficients_from_noiseless_losses(law: Law):
    found = fit_law(*arrays(runs_of(law)))
    assert not found.reduced and found.at_bound == ()
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4)


def test_one_size_gives_the_reduced_law_with_the_same_losses():
    runs = runs_of(LAW, sizes=[55e6])
    found = fit_law(*arrays(runs))
    assert found.reduced and found.names == ("b", "d", "E_start", "E_max")
    assert found.b == pytest.approx(LAW.b + LAW.c * math.log10(55e6), rel=1e-4)
    assert found.d == pytest.approx(LAW.d + LAW.a * math.log10(55e6), rel=1e-4)
    assert math.isnan(found.cutoff) and (found.a, found.c) == (0, 0)
    assert found.loss(55e6, 77) == pytest.approx(LAW.loss(55e6, 77), rel=1e-6)


def scipy_objective(start: Law, data: tuple) -> float:
    """The least sum of squares that scipy finds for all six coefficients at once."""
    size_R, experts_R, loss_R = data

    def errors(x):
        return np.log10(Law(*x).loss(size_R, experts_R) / loss_R)

    first = [getattr(start, name) for name in NAMES]
    options = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15, "max_nfev": 3000}
    return 2 * scipy.optimize.least_squares(errors, first, x_scale=np.abs(first), **options).cost


@pytest.mark.parametrize("noise", [0.001, 0.01])
@pytest.mark.parametrize("law", PUBLISHED.values(), ids=PUBLISHED)
def test_a_search_over_all_coefficients_finds_no_lower_sum_of_squares(law: Law, noise: float):
    data = arrays(runs_of(law, noise=noise))
    found = squared_error(fit_law(*data), *data)
    assert found == pytest.approx(scipy_objective(law, data), rel=1e-8)
    assert 0 < found < squared_error(law, *data)


def test_the_fit_does_not_depend_on_the_starting_point():
    data = arrays(runs_of(LAW, noise=0.003))
    elsewhere = dataclasses.replace(LAW, E_start=20.0, E_max=3e4)
    first, second = fit_law(*data), fit_law(*data, start=elsewhere)
    assert squared_error(first, *data) == pytest.approx(squared_error(second, *data), rel=1e-9)


def test_without_saturation_the_fit_ends_on_the_bound_of_E_max():
    """log10 L linear in log10 (E - 1 + 2) is the law with E_max at infinity."""
    experts = np.array([1, 2, 4, 8, 16, 32], float)
    found = fit_law(np.full(6, 1e6), experts, 3 * (experts + 1) ** -0.1)
    assert found.at_bound == ("E_max",)
    assert found.b == pytest.approx(-0.1, rel=1e-3) and found.E_start == pytest.approx(2, rel=1e-3)


def test_losses_independent_of_the_number_of_experts_are_fitted():
    found = fit_law(np.full(5, 1e6), [1, 2, 4, 8, 16], np.full(5, 2.5))
    assert found.loss(1e6, [1, 3, 16]) == pytest.approx(2.5)


def test_the_effective_size_is_that_of_the_dense_model_with_the_same_loss():
    size, experts = np.array([2e7, 1e9]), np.array([512, 16])
    equal = LAW.effective_size(size, experts)
    assert np.all(equal > size)
    assert LAW.loss(equal, 1) == pytest.approx(LAW.loss(size, experts), rel=1e-12)
    assert LAW.effective_size(size, 1) == pytest.approx(size, rel=1e-12)


def test_more_experts_do_not_help_at_the_cutoff():
    assert LAW.cutoff == pytest.approx(1e12)
    losses = LAW.loss(LAW.cutoff, [1, 8, 512])
    assert losses == pytest.approx(losses[0], rel=1e-12)
    assert LAW.loss(LAW.cutoff / 10, 512) < LAW.loss(LAW.cutoff / 10, 8)
    assert LAW.loss(LAW.cutoff * 10, 512) > LAW.loss(LAW.cutoff * 10, 8)
    assert dataclasses.replace(LAW, c=-0.01).cutoff == math.inf


@pytest.mark.parametrize(
    "name, coefficients, error",
    [
        (
            "S-Base",
            (-0.08635211552518177, -0.13713526799710707, 0.012223830157652169, 1.1431777812731976,
             2.3518875717865817, 190.76467339379866),
            0.00011429437910886412,
        ),
        (
            "Hash",
            (-0.09057920488370627, -0.15457276201576053, 0.014349994892618748, 1.1854538327318327,
             4.211395555260674, 391.7624023421613),
            0.00012110724640754026,
        ),
    ],
)  # fmt: skip
def test_the_fit_equals_that_of_the_replaced_solver(
    name: str, coefficients: tuple[float, ...], error: float
):
    """A hand-written Levenberg-Marquardt stopped at a relative cost change of 1e-12, so in flat
    directions coefficients were good to about 1e-6."""
    data = arrays(runs_of(PUBLISHED[name], noise=0.01))
    law = fit_law(*data)
    assert squared_error(law, *data) == pytest.approx(error, rel=1e-10)
    assert [getattr(law, field) for field in NAMES] == pytest.approx(coefficients, rel=2e-6)
