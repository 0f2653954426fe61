"""experiments/dselect_k: its measures by hand, its oracle, and its main claim.

Asserted is that DSelect-k moves smoothly. Which gate finds the right experts is reported by the
experiment and depends on rates and widths; a test that demanded an order would test luck.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from experiments.dselect_k import gates, metrics, oracle, recovery, rows, run, smoothness, tasks
from experiments.dselect_k.training import Setting
from moejax.gating import dselect_k_weights

SEEDS, EPOCHS = 3, 6
"""468 steps."""


@pytest.fixture(scope="module")
def problems():
    return recovery.draw(SEEDS, 16)


@pytest.fixture(scope="module")
def known(problems):
    return recovery.know(problems)


def test_selected_are_the_heaviest_experts_with_any_weight():
    weight = np.asarray([[0.1, 0.4, 0.1, 0.4], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    wanted = [[True, True, False, True], [False, True, False, False], [True, True, True, False]]
    np.testing.assert_array_equal(metrics.selected(weight, 3), wanted)


def test_the_jaccard_index_equals_a_value_by_hand():
    one = np.asarray([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    other = np.asarray([[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(metrics.jaccard(one, other), [1 / 4, 1, 1])


def test_variation_and_changes_along_a_path_equal_values_by_hand():
    path = np.asarray([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.0, 0.75, 0.25], [0.0, 0.75, 0.25]])
    assert metrics.total_variation(path) == 0.5 + 0.5 + 0
    assert metrics.support_changes(path, 2) == 1
    assert metrics.support_changes(path, 1) == 1  # a tie goes to expert 0, then expert 1 leads
    both = np.stack([path, path[:1].repeat(4, axis=0)])
    np.testing.assert_array_equal(metrics.total_variation(both), [1, 0])
    np.testing.assert_array_equal(metrics.support_changes(both, 2), [1, 0])


@pytest.mark.parametrize(
    ("error", "wanted"),
    [([8.0, 4.0, 1.0, 0.0, 0.0], 3), ([8.0, 0.05, 1.0, 0.05, 0.0], 3), ([2.0, 2.0], 0), ([1.0], 0)],
)
def test_steps_to_final_counts_until_the_error_stays(error, wanted):
    assert metrics.steps_to_final(np.asarray(error)) == wanted


def test_intervals_equal_textbook_values():
    # Student: t = 4.3027 for 2 degrees of freedom. Wilson: Newcombe 1998, table I, 81 of 263.
    mean, low, high = metrics.mean_interval(np.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(
        [mean, low, high], [2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], 1e-4
    )
    share = metrics.share_interval(np.arange(263) < 81)
    np.testing.assert_allclose(share, [81 / 263, 0.2553, 0.3662], atol=5e-5)


def test_tuned_settings_are_chosen_and_judged_on_different_seeds():
    flattered = rows.row({"gate": "a", "lr": 1.0}, {"test_mse": [0.0, 9.0, 0.0, 9.0]})
    steady = rows.row({"gate": "a", "lr": 2.0}, {"test_mse": [1.0, 1.0, 1.0, 1.0]})
    (chosen,) = rows.tuned([steady, flattered])
    assert chosen["lr"] == 1.0 and chosen["test_mse"][0] == 9.0
    (found,) = [rows.ratio(steady, rows.row({}, {"test_mse": [2.0, 2.0, 0.5, 0.5]}), "test_mse")]
    np.testing.assert_allclose(found[0], 1.0)


def test_sharing_distinguishes_the_two_halves():
    alike = np.asarray([[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2, bool)
    assert tasks.sharing(alike) == (1.0, 0.0)
    mixed = np.asarray([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
    np.testing.assert_allclose(tasks.sharing(mixed), [(1 / 3 + 1) / 2, (2 + 2 / 3) / 4])


@pytest.mark.slow
def test_the_data_match_the_description_on_the_page(problems):
    """Features of mean 0 and variance 1, four of 16 experts, targets off their mixture by noise."""
    features = problems.features_NE[:, : recovery.TRAIN]
    np.testing.assert_allclose(features.mean(axis=1), 0, atol=1e-4)  # float32 sums of 20,000
    np.testing.assert_allclose(features.std(axis=1), 1, atol=1e-4)
    assert ((problems.weight_ME > 0).sum(axis=-1) == 4).all()
    np.testing.assert_allclose(problems.weight_ME.sum(axis=-1), 1, rtol=1e-6)
    noise = problems.target_NM - problems.features_NE @ np.swapaxes(problems.weight_ME, 1, 2)
    np.testing.assert_allclose(noise.std(axis=1), 0.01, rtol=0.02)  # of 25,000: 0.5 % to a sigma
    halves = np.asarray(tasks.many_tasks(jax.random.key(0), 6, 8).weight_ME) > 0
    np.testing.assert_array_equal(halves, [[1] * 4 + [0] * 4] * 3 + [[0] * 4 + [1] * 4] * 3)


def test_the_best_mixture_equals_that_of_nonnegative_least_squares(problems, known):
    """The constraint that weights sum to 1 is a heavy row of nnls, another algorithm."""
    for seed in range(SEEDS):
        features = problems.features_NE[seed, : recovery.TRAIN].astype(np.float64)
        target = problems.target_NM[seed, : recovery.TRAIN, 0].astype(np.float64)
        heavy = 1e6
        wanted, _ = nnls(np.vstack([features, heavy * np.ones(16)]), np.append(target, heavy))
        np.testing.assert_allclose(known[seed].best_E, wanted, atol=1e-5)  # SLSQP's tolerance
        error = np.mean((features @ wanted - target) ** 2)
        np.testing.assert_allclose(oracle.mean_squared_error(wanted, known[seed].train), error)


def weights_in_float64(z, w, num_experts, gamma):
    """DSelect-k's formula once more, in numpy."""
    scaled = np.clip(z / gamma, -0.5, 0.5)
    one = -2 * scaled**3 + 1.5 * scaled + 0.5
    bits = z.shape[-1]
    code = (np.arange(num_experts)[:, None] >> np.arange(bits)[::-1]) & 1
    chosen = np.prod(np.where(code, one[..., None, :], 1 - one[..., None, :]), axis=-1)
    share = np.exp(w) / np.exp(w).sum(axis=-1, keepdims=True)
    return np.sum(share[..., None] * chosen, axis=-2)


def test_the_loss_of_dselect_k_has_no_jumps_along_a_line_and_that_of_top_k_has(known):
    """Three grids, each four times finer than the one before."""
    grids, found = (501, 2001, 8001), {}
    for name, gate in (("dselect_k", gates.dselect_k(1.0)), ("top_k", gates.top_k())):
        weights, size = smoothness.flat_weights(gate, 16)
        place = np.linspace(-1, 1, grids[-1])
        path = smoothness.along(weights, *smoothness.random_line(size, seed=1), place)
        every = [(grids[-1] - 1) // (count - 1) for count in grids]
        found[name] = np.asarray(
            [smoothness.largest_jumps(path[0][::n], path[1][::n], known[0].train) for n in every]
        )
    # Continuous and piecewise smooth: a grid four times finer has jumps four times smaller.
    smooth = found["dselect_k"]
    assert (smooth[1:] < 0.3 * smooth[:-1]).all() and (smooth > 0).all()
    # A jump stays what it is.
    np.testing.assert_allclose(found["top_k"][1:], found["top_k"][:-1], rtol=0.2)
    assert (found["top_k"][-1] > 20 * smooth[-1]).all()


def test_the_line_agrees_with_float64_and_its_slope_with_finite_differences(known):
    """The library computes gates in float32; the formula in numpy, in float64, has its jumps."""
    weights, size = smoothness.flat_weights(gates.dselect_k(1.0), 16)
    start, direction = smoothness.random_line(size, seed=1)
    place, step = np.linspace(-1, 1, 2001), 1e-6

    def exact(place):
        flat = np.asarray(start, np.float64) + place[:, None] * np.asarray(direction, np.float64)
        # ravel_pytree sorts by name: 16 bits of code, then 4 of mix.
        return weights_in_float64(flat[:, :16].reshape(-1, 4, 4), flat[:, 16:], 16, 1.0)

    found, slope = smoothness.along(weights, start, direction, place)
    wanted = exact(place)
    wanted_slope = (exact(place + step) - exact(place - step)) / (2 * step)
    np.testing.assert_allclose(found, wanted, atol=2e-6)  # float32
    np.testing.assert_allclose(slope, wanted_slope, atol=3e-5)  # float32, slopes up to 3
    np.testing.assert_allclose(
        smoothness.largest_jumps(found, slope, known[0].train),
        smoothness.largest_jumps(wanted, wanted_slope, known[0].train),
        rtol=2e-2,  # a jump of the slope is 1e-2, its rounding 1e-4
    )


@pytest.fixture(scope="module")
def trained(problems):
    """Paths of a short P1 [seed, rate, step, expert]."""
    settings = [Setting(1e-3), Setting(1e-2)]
    return {
        name: recovery.paths(gate, settings, problems, EPOCHS)
        for name, gate in (("dselect_k", gates.dselect_k(1.0)), ("top_k", gates.top_k()))
    }


@pytest.mark.slow
def test_dselect_k_travels_far_less_than_top_k_at_equal_rates(trained):
    """The claim, at rates up to 1e-2; at 5e-2 the pilot saw none."""
    calm = metrics.total_variation(trained["dselect_k"])
    rough = metrics.total_variation(trained["top_k"])
    assert (rough.mean(axis=0) > 3 * calm.mean(axis=0)).all()


def test_no_gate_is_better_than_the_best_mixture(trained, known):
    """On the examples it was fitted to, in float64; and every gate has learned something."""
    for path in trained.values():
        for seed in range(SEEDS):
            error = oracle.mean_squared_error(path[seed], known[seed].train)
            best = oracle.mean_squared_error(known[seed].best_E, known[seed].train)
            # Float32 weights sum to 1 within 1e-6, and the error's slope is about 1.
            assert (error >= best - 1e-6).all()
            assert (error[:, -1] < error[:, 0]).all()


@pytest.mark.slow
def test_weights_equal_those_of_the_library():
    """The weights of DSelect-k, whose gate object is used here, and of the others in evaluation."""
    gate, key = gates.dselect_k(1.0), jax.random.key(3)
    params = jax.tree.map(lambda leaf: 30 * leaf, gate.init(key, 16))
    wanted = dselect_k_weights(params["code_MZ"].reshape(4, 4), params["mix_MS"][0], 16, 1.0)
    np.testing.assert_allclose(gate.evaluation(params, 16), wanted, rtol=1e-6)
    logits = jnp.arange(6.0)[None]
    kept = np.exp(np.arange(2.0, 6)) / np.exp(np.arange(2.0, 6)).sum()
    for gate in (gates.top_k(), gates.noisy_top_k()):
        params = {"router_DE": logits, "noise_DE": 0 * logits}
        np.testing.assert_allclose(gate.evaluation(params, 6), [0, 0, *kept], rtol=1e-6)
    for gate in (gates.softmax(), gates.gumbel_softmax(10)):
        got = gate.evaluation({"router_DE": logits}, 6)
        np.testing.assert_allclose(got, jax.nn.softmax(logits[0]), rtol=1e-6)


@pytest.mark.slow
def test_unreachable_codes_end_with_little_mass_and_the_penalty_takes_it_sooner():
    """E = 5 of 8 codes: 3/8 of the mass at the start belongs to no expert."""
    problems = recovery.draw(SEEDS, 5)
    settings = [Setting(1e-2, range=0.0), Setting(1e-2, range=1.0)]
    path = recovery.paths(gates.dselect_k(1.0), settings, problems, EPOCHS)
    missing = 1 - path.sum(axis=-1, dtype=np.float64)
    np.testing.assert_allclose(missing[:, :, 0], 3 / 8, atol=0.02)  # codes start within gamma/100
    assert (missing[:, 1].mean(axis=-1) < missing[:, 0].mean(axis=-1)).all()
    assert (missing[:, 1, -1] < 0.05).all() and (missing[:, :, -1] > -1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=p9"], "--only=p9 is unknown; use some of p1,p2,p3,p4,p5"),
        (["--seeds=3"], "--seeds=3 must be at least 8"),
        (["--plot=/nowhere/x.png"], "--plot=/nowhere/x.png: make its folder first"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as stop:
        run.main([f"--out={out}", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_every_protocol_prints_a_table_and_writes_every_seed(tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    run.main([f"--out={out}", f"--plot={plot}", "--quick"])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found) == ["p1", "p2", "p3", "p4", "p5"] and plot.stat().st_size > 10_000
    assert "NaN" not in out.read_text()
    for name, part in found.items():
        assert f"{name.upper()}: " in printed
        for row in part["rows"]:
            noise = row.get("gate") in ("noisy_top_k", "gumbel_softmax")
            seeds = part["seeds"] // 2 if name == "p1" and noise else part["seeds"]
            assert row["seeds"] and all(len(value) == seeds for value in row["seeds"].values())


@pytest.mark.slow
def test_longer_runs_are_as_smooth_and_leave_no_mass_on_unreachable_codes(problems):
    """As P1 and P5, with a fifth of their steps."""
    settings = [Setting(1e-3), Setting(1e-2)]
    calm, rough = (
        metrics.total_variation(recovery.paths(gate, settings, problems, 20))
        for gate in (gates.dselect_k(1.0), gates.top_k())
    )
    assert (rough.mean(axis=0) > 3 * calm.mean(axis=0)).all()
    for num_experts in (6, 12):
        path = recovery.paths(
            gates.dselect_k(1.0), settings[1:], recovery.draw(SEEDS, num_experts), 20
        )
        assert (1 - path[:, 0, -1].sum(axis=-1) < 1e-3).all()
