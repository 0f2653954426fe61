"""Folders of sweeps, made of workdirs that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.analysis import workdirs

GATES = {"switch": "switch", "top_2": "top_k"}


def write(
    folder: Path,
    seeds: Sequence[int] = (0, 1),
    finished: bool = True,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Two variants with these seeds; without ``finished`` there is the index alone."""
    folder.mkdir(parents=True)
    trials = []
    for number, (variant, gate) in enumerate(GATES.items()):
        for seed in seeds:
            name = f"{variant}-seed{seed}"
            config = workdirs.config(train__seed=seed, moe__gate__name=gate)
            overrides = [f"--config.moe.gate.name={gate}", f"--config.train.seed={seed}"]
            trials.append(
                {
                    "name": name, "id": f"id{number}{seed}", "variant": variant, "seed": seed,
                    "overrides": overrides, "config": config,
                }
            )  # fmt: skip
            if finished:
                about = workdirs.saved(config)
                workdirs.write(folder / "trials" / name, about=about, seed=10 * number + seed)
    index = {"experiment": "experiments/two.py", "trials": trials}
    (folder / "sweep.json").write_text(json.dumps(index))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def outcome(variant: str, mean: float, **changes: Any) -> dict[str, Any]:
    """One variant of summary.json (docs/sweeps.md)."""
    trials = [
        {
            "seed": seed, "workdir": f"trials/{variant}-seed{seed}", "loss": mean + 0.01 * sign,
            "difference": None, "cost": 2e6, "cost_ratio": 1.0, "missed_match": False,
        }
        for seed, sign in ((0, -1), (1, 1))
    ]  # fmt: skip
    return {
        "variant": variant, "wanted": 2, "seeds": [0, 1], "unfinished": [], "diverged": [],
        "mean": mean, "half_width": 0.127, "deviation": 0.014, "difference": None,
        "verdict": "", "cost": 2e6, "cost_ratio": 1.0, "missed_match": False, "leak": "",
        "marks": [], "trials": trials,
    } | changes  # fmt: skip


def summary(*outcomes: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "experiment": "experiments/two.py",
        "baseline": "top_2",
        "match": "active_flops",
        "tolerance": 0.02,
        "confidence": 0.95,
        "cost": {"name": "active_flops", "unit": "FLOP per token, forward and backward"},
        "detectable": {
            "difference": 0.031, "seeds": 2, "power": 0.8, "level": 0.05, "deviation": 0.011,
            "freedom": 1, "source": "differences to top_2 in this sweep",
        },
        "variants": list(outcomes),
    }  # fmt: skip
