"""P1: recovery of the four experts that made the data, when the experts are given.

And P5: the codes of DSelect-k that number no expert, when E is no power of two. Only the gate is
trained, and the error of the best mixture is known (`oracle`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dselect_k import gates, metrics, oracle
from experiments.dselect_k.problems import TRAIN, Problem, one_task
from experiments.dselect_k.rows import Row, row
from experiments.dselect_k.training import STEPS_PER_EPOCH, Setting, train_all

RATES = (1e-3, 1e-2)
GAMMAS = (0.1, 1.0, 10.0)
LAMBDAS = (0.0, 1e-3, 1e-2, 1e-1)
NUM_EXPERTS = 16
STARTS = (gates.START, 0.3)
"""Standard deviations of top-k's logits; the second is the library's for a width of 1."""
ODD_SIZES = (5, 6, 12)


def p1(seeds: int, epochs: int, gammas: tuple[float, ...] = GAMMAS) -> Iterator[Row]:
    """Gates with noise get half the seeds: they draw and choose for every example, and cost as
    much as all others together.
    """
    problems = draw(seeds, NUM_EXPERTS)
    known = know(problems)
    yield from _oracle_row(known)
    plain = [Setting(rate) for rate in RATES]
    for label, gate in without_noise():
        labels = [{**label, "lr": rate} for rate in RATES]
        yield from study(gate, plain, labels, problems, known, epochs)
    settings = [Setting(rate, weight) for rate in RATES for weight in LAMBDAS]
    for gamma in gammas:
        labels = [
            {"gate": "dselect_k", "gamma": gamma, "lambda": s.entropy, "lr": s.learning_rate}
            for s in settings
        ]
        yield from study(gates.dselect_k(gamma), settings, labels, problems, known, epochs)
    half = seeds // 2
    some = jax.tree.map(lambda leaf: leaf[:half], problems)
    for label, gate in with_noise(epochs):
        labels = [{**label, "lr": rate} for rate in RATES]
        yield from study(gate, plain, labels, some, known[:half], epochs)


def p5(seeds: int, epochs: int, sizes: tuple[int, ...] = ODD_SIZES) -> Iterator[Row]:
    settings = [Setting(rate, range=penalty) for rate in RATES for penalty in (0.0, 1.0)]
    for num_experts in sizes:
        labels = [{"E": num_experts, "penalty": s.range, "lr": s.learning_rate} for s in settings]
        problems = draw(seeds, num_experts)
        yield from study(gates.dselect_k(1.0), settings, labels, problems, know(problems), epochs)


def without_noise() -> list[tuple[dict[str, Any], gates.StaticGate]]:
    """Top-k depends on where it starts: two starts."""
    top_k = [({"gate": "top_k", "start": start}, gates.top_k(start)) for start in STARTS]
    return [*top_k, ({"gate": "softmax"}, gates.softmax())]


def with_noise(epochs: int) -> list[tuple[dict[str, Any], gates.StaticGate]]:
    return [
        ({"gate": "noisy_top_k"}, gates.noisy_top_k()),
        ({"gate": "gumbel_softmax"}, gates.gumbel_softmax(epochs * STEPS_PER_EPOCH)),
    ]


def draw(seeds: int, num_experts: int) -> Problem:
    """The problems of seeds 0 .. n-1, in numpy."""
    one = lambda seed: one_task(jax.random.key(seed), num_experts, gates.K)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jnp.arange(seeds)))


def paths(
    gate: gates.StaticGate, settings: list[Setting], problems: Problem, epochs: int
) -> np.ndarray:
    """Weights over time of every seed and setting [R, L, S, E]."""
    run = train_all(
        gate, problems.features_NE, problems.target_NM, settings,
        num_experts=problems.features_NE.shape[-1], epochs=epochs,
       
    )  # fmt: skip
    return run.weight_SME[:, :, :, 0]


def study(
    gate: gates.StaticGate, settings: list[Setting], labels: list[dict[str, Any]],
    problems: Problem, known: list["Known"], epochs: int,
) -> Iterator[Row]:  # fmt: skip
    """Trains the gate in every setting and judges it: a row per setting."""
    weight_RLSE = paths(gate, settings, problems, epochs)
    for number, label in enumerate(labels):
        judged = [judge(*one) for one in zip(weight_RLSE[:, number], known, strict=True)]
        yield row(label, {name: [one[name] for one in judged] for name in judged[0]})


class Known(NamedTuple):
    """One problem: the error as a quadratic, its optimum, and the true experts."""

    train: oracle.Moments
    test: oracle.Moments
    best_E: np.ndarray
    true_E: np.ndarray


def know(problems: Problem) -> list[Known]:
    found = []
    for features_NE, target_NM, weight_ME in zip(
        problems.features_NE, problems.target_NM, problems.weight_ME, strict=True
    ):
        train = oracle.moments(features_NE[:TRAIN], target_NM[:TRAIN, 0])
        test = oracle.moments(features_NE[TRAIN:], target_NM[TRAIN:, 0])
        found.append(Known(train, test, oracle.best_mixture(train), weight_ME[0] > 0))
    return found


def judge(weight_SE: np.ndarray, known: Known) -> dict[str, float]:
    """Every number that is reported of one run."""
    end_E, best = weight_SE[-1], oracle.mean_squared_error(known.best_E, known.train)
    found_E = metrics.selected(end_E, gates.K)
    error_S = oracle.mean_squared_error(weight_SE, known.test)
    return {
        "exact": float(np.array_equal(found_E, known.true_E)),
        "jaccard": float(metrics.jaccard(found_E, known.true_E)),
        "test_mse": float(error_S[-1]),
        "above_optimum": float(oracle.mean_squared_error(end_E, known.train) - best),
        "total_variation": float(metrics.total_variation(weight_SE)),
        "support_changes": float(metrics.support_changes(weight_SE, gates.K)),
        "nonzero": float(np.sum(end_E > 0)),
        "visible": float(np.sum(end_E > metrics.VISIBLE)),
        "steps_to_final": metrics.steps_to_final(error_S),
        "missing_mass": float(1 - np.sum(end_E, dtype=np.float64)),
    }


def _oracle_row(known: list[Known]) -> Iterator[Row]:
    judged = [judge(one.best_E[None], one) for one in known]
    kept = ("exact", "jaccard", "test_mse", "visible")
    yield row({"gate": "convex optimum"}, {name: [one[name] for one in judged] for name in kept})
