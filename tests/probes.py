"""A small probe, made by a random number generator instead of a run."""

from pathlib import Path
from typing import Any

import numpy as np

from moejax.record import probe
from moejax.train.probe.arrays import formats

M, N, L, K, E, V = 2, 6, 16, 2, 4, 12
LABELS = ("code", "comment")


def tokens(seed: int = 0, labels: bool = True) -> dict[str, Any]:
    """Random tokens; the last two positions of the last sequence are padding."""
    rng = np.random.default_rng(seed)
    stream_NL = rng.integers(0, V, (N, L + 1))
    valid_NL = np.ones((N, L), bool)
    valid_NL[-1, -2:] = False
    arrays = {
        "token": stream_NL[:, :-1],
        "target": stream_NL[:, 1:],
        "valid": valid_NL,
        "row": np.arange(N),
        "token_text": np.array([f"t{i}" for i in range(V)]),
    }
    if labels:
        arrays |= {"label": rng.integers(0, len(LABELS), (N, L)), "label_names": np.array(LABELS)}
    return arrays


def step(seed: int, valid_NL: np.ndarray, router: bool = True) -> dict[str, Any]:
    """Top-k of random logits, with the statistics that belong to them."""
    rng = np.random.default_rng(1000 + seed)
    logits_MNLE = rng.normal(size=(M, N, L, E))
    log_z_MNL = np.log(np.exp(logits_MNLE).sum(-1))
    probs_MNLE = np.exp(logits_MNLE - log_z_MNL[..., None])
    expert_MNLK = np.argsort(-logits_MNLE, axis=-1, kind="stable")[..., :K]
    weight_MNLK = np.take_along_axis(probs_MNLE, expert_MNLK, -1) * valid_NL[..., None]
    ordered_MNLE = np.sort(probs_MNLE, axis=-1)
    arrays = {
        "expert": expert_MNLK,
        "weight": weight_MNLK,
        "kept": (weight_MNLK > 0) & (rng.random(weight_MNLK.shape) < 0.9),
        "entropy": -(probs_MNLE * np.log(probs_MNLE)).sum(-1),
        "margin": ordered_MNLE[..., -1] - ordered_MNLE[..., -2],
        "log_z": log_z_MNL,
        "max_logit": np.abs(logits_MNLE).max(-1),
        "nats": rng.exponential(size=(N, L)),
        "expert_similarity": np.stack([np.eye(E)] * M),
        "collapse": rng.random(M),
        "participation": 1 + rng.random(M),
        "num_experts": E,
    }
    return arrays | ({"router_similarity": np.stack([np.eye(E)] * M)} if router else {})


def save_step(workdir: Path, number: int, arrays: dict[str, Any]) -> None:
    """Writes the arrays of a step in the format of runs."""
    probe.save_step(workdir, number, arrays, formats())


def write(
    workdir: Path, steps: tuple[int, ...] = (0, 10, 20), labels: bool = True, router: bool = True
) -> None:
    """Writes a probe to a workdir; seed = step, so that every step routes differently."""
    arrays = tokens(labels=labels)
    probe.save_tokens(workdir, arrays)
    for number in steps:
        save_step(workdir, number, step(number, arrays["valid"], router))
