"""P2: the same data, the experts learned from scratch together with the gate.

Learned experts have no names, so there is no set to recover: what is left to compare is the error,
how many experts are visited and how calmly they are chosen.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dselect_k import gates, metrics
from experiments.dselect_k.problems import TRAIN, Problem, outputs
from experiments.dselect_k.recovery import NUM_EXPERTS, RATES, draw, with_noise, without_noise
from experiments.dselect_k.rows import Row, row
from experiments.dselect_k.training import Run, Setting, train_all

GAMMAS = (1.0, 10.0)


def p2(seeds: int, epochs: int, gammas: tuple[float, ...] = GAMMAS) -> Iterator[Row]:
    problems = draw(seeds, NUM_EXPERTS)
    plain = [Setting(rate) for rate in RATES]
    for label, gate in [*without_noise(), *with_noise(epochs)]:
        labels = [{**label, "lr": rate} for rate in RATES]
        yield from _study(gate, plain, labels, problems, epochs)
    settings = [Setting(rate, weight) for rate in RATES for weight in (0.0, 1e-2)]
    for gamma in gammas:
        labels = [
            {"gate": "dselect_k", "gamma": gamma, "lambda": s.entropy, "lr": s.learning_rate}
            for s in settings
        ]
        yield from _study(gates.dselect_k(gamma), settings, labels, problems, epochs)


def _study(
    gate: gates.StaticGate, settings: list[Setting], labels: list[dict[str, Any]],
    problems: Problem, epochs: int,
) -> Iterator[Row]:  # fmt: skip
    run = train_all(
        gate, problems.x_ND, problems.target_NM, settings, num_experts=NUM_EXPERTS,
        epochs=epochs, learn_experts=True,
    )  # fmt: skip
    error_RLM = heldout_errors(run, problems)
    for number, label in enumerate(labels):
        weight_RSE = run.weight_SME[:, number, :, 0]
        yield row(
            label,
            {
                "test_mse": error_RLM[:, number, 0].tolist(),
                "total_variation": metrics.total_variation(weight_RSE).tolist(),
                "support_changes": metrics.support_changes(weight_RSE, gates.K).tolist(),
                "nonzero": np.sum(weight_RSE[:, -1] > 0, axis=-1).tolist(),
                "visible": np.sum(weight_RSE[:, -1] > metrics.VISIBLE, axis=-1).tolist(),
            },
        )


def heldout_errors(run: Run, problems: Problem) -> np.ndarray:
    """Mean squared error of each task on the test examples, with the learned experts [R, L, M]."""

    def one(weight_SME, experts, x_ND, target_NM):
        return jnp.mean((outputs(experts, x_ND) @ weight_SME[-1].T - target_NM) ** 2, axis=0)

    over_settings = jax.vmap(one, (0, 0, None, None))
    each = jax.jit(jax.vmap(over_settings))
    return np.asarray(
        each(run.weight_SME[:, :, -1:], run.experts, problems.x_ND[:, TRAIN:],
             problems.target_NM[:, TRAIN:])
    )  # fmt: skip
