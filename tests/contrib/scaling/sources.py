"""Curves and sweeps whose law is known; the published curves, where they are at hand."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.contrib.scaling.law import Law
from moejax.contrib.scaling.runs import CURVES, RESULTS, Run

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "clark2022_routing_curves.csv.gz"
published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason=f"the published curves are not at {PUBLISHED}"
)

LAW = Law(-0.08, -0.12, 0.01, 1.1, 2.0, 300.0)
SIZES = (15e6, 55e6, 370e6, 1.3e9)
EXPERTS = (1, 2, 8, 32, 128, 512)

Loss = Callable[[int, int], float]


def runs_of(
    law: Law, sizes: Iterable[float] = SIZES, experts: Iterable[int] = EXPERTS, noise: float = 0.0
) -> list[Run]:
    """A run per size and number of experts; ``noise`` is relative, drawn the same every time."""
    rng = np.random.default_rng(1)
    return [
        Run("R", n, e, 0, float(law.loss(n, e)) * float(np.exp(noise * rng.normal())), f"{n:g} {e}")
        for n in sizes
        for e in experts
    ]


def curve(number: int, run: Run, **changes: Any) -> dict[str, Any]:
    """The row of a table of curves that is a run's last evaluation."""
    row = {
        "hyper_id": number,
        "step": 100,
        "loss_validation": run.loss,
        "num_experts": run.experts,
        "k": 1,
        "router_type": run.router,
        "seed": run.seed,
        "routing_frequency": 0.5,
        "flop_increase": 1.0,
        "dense_parameter_count": run.size,
    }
    return {**row, **changes}


def write_curves(path: Path, rows: Iterable[dict[str, Any]], columns: Any = CURVES) -> Path:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def trial(
    variant: str, gate: str, experts: int, k: int = 1, **moe: Any
) -> tuple[str, dict[str, Any]]:
    """A variant of a sweep of a small model: two layers of width 8, experts 8 x 16."""
    fields = {
        "num_experts": experts,
        "d_ff": 16,
        "every": 1,
        "first_dense": 0,
        "shared_experts": 0,
        "activation": "swiglu",
        "gate": {"name": gate, "k": k} if gate == "top_k" else {"name": gate},
    }
    return variant, {"model": {"d_model": 8, "num_layers": 2, "d_ff": 16}, "moe": {**fields, **moe}}


DENSE_PARAMETERS = 2048
EXPERT = 3 * 8 * 16
"""Parameters of one expert: three matrices between 8 and 16."""


def total_parameters(config: dict[str, Any]) -> int:
    """As a run counts them: the dense model, further experts and a router of 8 x E per layer."""
    moe = config["moe"]
    if not moe["every"]:
        return DENSE_PARAMETERS
    router = 0 if moe["gate"]["name"] == "hash" else 8 * moe["num_experts"]
    return DENSE_PARAMETERS + 2 * ((moe["num_experts"] - 1) * EXPERT + router)


def write_sweep(
    folder: Path, trials: Iterable[tuple[str, dict[str, Any]]], loss: Loss, seeds: int = 3
) -> Path:
    """A sweep's folder as it is when the sweep has ended; ``loss`` is of (experts, seed)."""
    folder.mkdir(exist_ok=True)
    index, rows = [], []
    for variant, config in trials:
        for seed in range(seeds):
            index.append({"name": f"{variant}-seed{seed}", "config": config})
            experts = config["moe"]["num_experts"] if config["moe"]["every"] else 1
            total = total_parameters(config)
            rows.append([variant, seed, 1, loss(experts, seed), total])
    (folder / "sweep.json").write_text(json.dumps({"trials": index}))
    with open(folder / "results.csv", "w", newline="") as file:
        csv.writer(file).writerows([RESULTS, *rows])
    return folder
