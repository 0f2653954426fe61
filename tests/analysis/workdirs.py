"""Workdirs as a run would leave them, made of numbers that a test chooses."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import apply_overrides, default, to_dict

LAYERS, EXPERTS, K, LENGTH, ROWS = 2, 4, 2, 8, 4
PAIRS = LENGTH * ROWS * K
"""Pairs of one layer in one step."""


def config(**changes: Any) -> dict[str, Any]:
    """The defaults, small, with changes by dotted name (``moe__every=0``)."""
    found = default()
    small = {
        "train.steps": 30, "train.batch_size": ROWS, "train.seq_len": LENGTH,
        "model.num_layers": LAYERS, "moe.num_experts": EXPERTS, "mesh.expert": 1,
    }  # fmt: skip
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    apply_overrides(found, [f"--config.{name}={value}" for name, value in (small | fields).items()])
    return to_dict(found)


def saved(of: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json."""
    counted = {"fixed": 1000.0, "per_pair": 100.0}
    return {
        "config": of or config(),
        "source": "configs/lm.py",
        "overrides": [],
        "flops": {"train": {k: 3 * v for k, v in counted.items()}, "eval": counted},
        "version": "0.1.0",
        "corpus": "a corpus",
        "fingerprint": "ab" * 32,
        "heldout_bytes_per_token": 1.0,
        "baselines": {"unigram": 3.0, "bigram": 2.5},
        "parameters": {"total": 9552, "active": 8016},
        "visibility": "",
        "memory": {"state": 2**20, "activations": 2**21},
        "devices": {"kind": "cpu", "count": 1},
    } | changes


def row(step: int, split: str = "train", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl with experts, loads drawn from a seed and the step."""
    rng = np.random.default_rng([seed, step, split == "eval"])
    load = rng.multinomial(PAIRS, np.full(EXPERTS, 1 / EXPERTS), size=LAYERS)
    dropped = np.maximum(load - PAIRS // EXPERTS, 0) if split == "train" else 0 * load
    by_position = np.stack(
        [rng.multinomial(n, np.full(LENGTH, 1 / LENGTH)) for n in dropped.sum(1)]
    )
    by_choice = np.stack([rng.multinomial(n, [0.25, 0.75]) for n in dropped.sum(1)])
    own = {"total_loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    held = {"bits_per_byte": 4.0}
    return {
        "step": step,
        "split": split,
        "loss": 2.0 + 3.0 / (1 + step) + float(rng.normal(0, 0.01)),
        "accuracy": 0.25,
        "aux/load_balance": 1.1,
        "aux/z": 2.0,
        **(own if split == "train" else held),
        "moe/max_vio": float((load.max(1) / load.mean(1) - 1).mean()),
        "moe/drop_rate": int(dropped.sum()) / int(load.sum()),
        "moe/unserved_rate": 0.0,
        "moe/experts_per_token": float(K),
        "moe/router_entropy": 1.0,
        "moe/load": load.tolist(),
        "moe/dropped": dropped.tolist(),
        "moe/dropped_by_position": by_position.tolist(),
        "moe/dropped_by_choice": by_choice.tolist(),
        "leak": "",
    } | {name.replace("__", "/"): value for name, value in changes.items()}


def timing(step: int, seconds: float = 0.5) -> dict[str, Any]:
    """A row of timings.jsonl."""
    return {
        "step": step, "seconds_per_step": seconds, "tokens_per_second": 64 / seconds,
        "mfu": 0.1, "elapsed": step * seconds,
    }  # fmt: skip


def write(
    folder: Path,
    rows: Iterable[Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A workdir; by default that of a finished run of 30 steps, logged at every tenth."""
    if rows is None:
        steps = (10, 20, 30)
        train = [row(step, seed=seed) for step in steps]
        held_out = [row(step, "eval", seed=seed) for step in steps[1:]]
        rows = sorted([*train, *held_out], key=lambda row: (row["step"], row["split"] == "eval"))
    rows = list(rows)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about or saved()))
    lines(folder / "metrics.jsonl", rows)
    steps = [row["step"] for row in rows if row["split"] == "train"]
    lines(folder / "timings.jsonl", [timing(step) for step in steps])
    return folder


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
