"""P3: many tasks in two halves that share only their inputs. Which tasks share experts?

Each half was made by four experts of its own. A multi-gate mixture (Ma et al. 2018: experts are
shared, every task has its gate) of eight learned experts and one static gate per task should give
all tasks of a half the same four, and the halves different ones.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dselect_k import gates, metrics
from experiments.dselect_k.learned import GAMMAS, heldout_errors
from experiments.dselect_k.problems import Problem, many_tasks
from experiments.dselect_k.rows import Row, row
from experiments.dselect_k.training import Setting, train_all

NUM_EXPERTS = 8
NUM_TASKS = (16, 32, 64, 128)
RATE = 1e-2


def p3(
    seeds: int, epochs: int, num_tasks: tuple[int, ...] = NUM_TASKS,
    gammas: tuple[float, ...] = GAMMAS,
) -> Iterator[Row]:  # fmt: skip
    for tasks in num_tasks:
        one = lambda seed, tasks=tasks: many_tasks(jax.random.key(seed), tasks, NUM_EXPERTS)
        problems = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jnp.arange(seeds)))
        for name, gate in (("top_k", gates.top_k()), ("softmax", gates.softmax())):
            label = {"gate": name, "tasks": tasks}
            yield from _study(gate, [Setting(RATE)], [label], problems, epochs)
        settings = [Setting(RATE, weight) for weight in (0.0, 1e-2)]
        for gamma in gammas:
            labels = [
                {"gate": "dselect_k", "gamma": gamma, "lambda": s.entropy, "tasks": tasks}
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
        end_RME = run.weight_SME[:, number, -1]
        within, across = zip(*(sharing(metrics.selected(q, gates.K)) for q in end_RME), strict=True)
        path_RMSE = np.swapaxes(run.weight_SME[:, number], 1, 2)
        yield row(
            label,
            {
                "test_mse": error_RLM[:, number].mean(axis=1).tolist(),
                "jaccard_within": within,
                "jaccard_across": across,
                "nonzero": np.sum(end_RME > 0, axis=-1).mean(axis=1).tolist(),
                "visible": np.sum(end_RME > metrics.VISIBLE, axis=-1).mean(axis=1).tolist(),
                "total_variation": metrics.total_variation(path_RMSE).mean(axis=1).tolist(),
            },
        )


def sharing(selected_ME: np.ndarray) -> tuple[float, float]:
    """Mean Jaccard index of the experts of two tasks: of the same half, and of different ones."""
    overlap_MM = metrics.jaccard(selected_ME[:, None], selected_ME[None])
    first_M = np.arange(len(selected_ME)) < len(selected_ME) // 2
    same_MM = first_M[:, None] == first_M[None]
    other_MM = ~np.eye(len(selected_ME), dtype=bool)
    return float(overlap_MM[same_MM & other_MM].mean()), float(overlap_MM[~same_MM].mean())
