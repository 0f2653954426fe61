"""Intervals and held-out errors, against loops written out here."""

import dataclasses

import numpy as np
import pytest

from moejax.contrib.scaling import checks
from moejax.contrib.scaling.law import FULL, SATURATION, fit_law
from moejax.errors import UserError
from tests.contrib.scaling.sources import EXPERTS, LAW, SIZES, runs_of


def with_seeds(noise: float) -> list:
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(run, seed=seed, loss=run.loss * np.exp(noise * rng.normal()))
        for run in runs_of(LAW)
        for seed in range(2)
    ]


@pytest.mark.parametrize("group", [checks.CELL, checks.SIZE, checks.EXPERTS])
def test_a_held_out_run_is_predicted_by_a_fit_without_its_group(group: checks.Coverage):
    runs = with_seeds(0.005)
    found = checks.held_out(runs, checks.fit_runs(runs), group)
    assert len(found) == len(runs)
    for prediction in found[::7]:
        seen = [run for run in runs if group(run) != group(prediction.run)]
        data = np.array([[r.size, r.experts, r.loss] for r in seen])
        law = fit_law(data[:, 0], data[:, 1], data[:, 2])
        expected = float(law.loss(prediction.run.size, prediction.run.experts))
        assert prediction.loss == pytest.approx(expected, rel=1e-6)
        assert prediction.error == pytest.approx(expected / prediction.run.loss - 1, abs=1e-6)


def test_runs_that_follow_the_law_are_predicted_exactly():
    runs = runs_of(LAW)
    errors = checks.errors(checks.held_out(runs, checks.fit_runs(runs), checks.SIZE))
    assert errors.runs == len(runs) and errors.largest < 1e-5


def test_the_error_of_an_outlier_is_its_distance_from_the_law():
    runs = runs_of(LAW)
    runs[9] = dataclasses.replace(runs[9], loss=runs[9].loss * 1.05)
    found = checks.held_out(runs, checks.fit_runs(runs), checks.CELL)
    worst = max(found, key=lambda prediction: abs(prediction.error))
    assert worst.run == runs[9] and worst.error == pytest.approx(1 / 1.05 - 1, rel=1e-3)


def test_groups_without_which_the_law_is_not_determined_are_not_predicted():
    runs = runs_of(LAW, sizes=SIZES[:2])
    law = checks.fit_runs(runs)
    assert checks.held_out(runs, law, checks.SIZE) == []
    assert len(checks.held_out(runs, law, checks.CELL)) == len(runs)


def test_errors_are_the_mean_and_largest_absolute_relative_error():
    run = runs_of(LAW)[0]
    found = checks.errors([checks.Prediction(run, run.loss * x) for x in (1.01, 0.97)])
    assert found.mean == pytest.approx(0.02) and found.largest == pytest.approx(0.03)


def test_the_same_seed_draws_the_same_laws_and_another_one_others():
    runs = runs_of(LAW, noise=0.003)
    law = checks.fit_runs(runs)
    one, same, other = (
        checks.resampled_laws(runs, law, 3, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert one == same and one != other


def test_bootstrap_intervals_contain_the_coefficients_and_widen_with_the_noise():
    widths = []
    for noise in (0.0005, 0.004):
        runs = with_seeds(noise)
        laws = checks.resampled_laws(runs, checks.fit_runs(runs), 200, np.random.default_rng(0))
        ends = {n: checks.interval([getattr(x, n) for x in laws]) for n in (*FULL, *SATURATION)}
        assert all(low <= getattr(LAW, n) <= high for n, (low, high) in ends.items())
        widths.append([high - low for low, high in ends.values()])
    assert np.all(np.array(widths[1]) > 3 * np.array(widths[0]))


def test_a_resample_that_determines_nothing_is_drawn_again():
    """Many resamples of so few runs have too few cells for the law."""
    runs = runs_of(LAW, sizes=SIZES[:2], experts=EXPERTS[:4])
    laws = checks.resampled_laws(runs, LAW, 20, np.random.default_rng(0))
    assert len(laws) == 20
    # Every one of them saw losses without noise.
    assert max(law.loss(15e6, 8) / LAW.loss(15e6, 8) for law in laws) < 1.0001


def test_an_interval_is_the_middle_95_percent_and_may_be_open():
    assert checks.interval(range(1001)) == (25, 975)
    assert checks.interval([1.0] * 90 + [np.inf] * 10) == (1.0, np.inf)


@pytest.mark.parametrize(
    ("sizes", "experts", "said"),
    [
        (
            SIZES[:1],
            EXPERTS[:4],
            "4 distinct (size, experts) with 4 numbers of experts; the reduced",
        ),
        (SIZES[:2], EXPERTS[:3], "6 distinct (size, experts) with 3 numbers of experts; the full"),
        (SIZES, EXPERTS[:3], "12 distinct (size, experts) with 3 numbers of experts"),
    ],
)
def test_too_few_cells_are_refused_with_both_numbers(sizes, experts, said: str):
    with pytest.raises(UserError) as error:
        checks.check_enough("R", runs_of(LAW, sizes=sizes, experts=experts))
    needed = "needs 5 with 4" if len(sizes) == 1 else "needs 8 with 4"
    assert said in str(error.value) and needed in str(error.value)


def test_just_enough_cells_are_accepted():
    checks.check_enough("R", runs_of(LAW, sizes=SIZES[:1], experts=EXPERTS[:5]))
    checks.check_enough("R", runs_of(LAW, sizes=SIZES[:2], experts=EXPERTS[:4]))
