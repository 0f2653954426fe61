"""Seed n of every variant: the same batches, and the same initial weights where shapes agree."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax.config import load
from moejax.train import setup
from tests.train import runs

Weights = dict[str, np.ndarray]

FIRST: dict[str, Any] = {"moe__gate__name": "switch"}
OTHERS: dict[str, dict[str, Any]] = {
    "top_2": {"moe__gate__name": "top_k"},
    "hash": {"moe__gate__name": "hash"},  # no parameters
    "base": {"moe__gate__name": "base"},  # drawn in another way
    "dselect_k": {"moe__gate__name": "dselect_k"},  # other parameters
    "shared": {"moe__gate__name": "switch", "moe__shared_experts": 1},
    "dense_ffn": {"moe__every": 0},
}


def prepared(text: Path, seed: int = 5, **changes: Any) -> setup.Run:
    plain: dict[str, Any] = {"moe__losses__load": 0.0, "mesh__expert": 1, "train__seed": seed}
    return setup.prepare(load(runs.PAGE, runs.flags(text, **plain, **changes)).config)


def weights(run: setup.Run) -> Weights:
    params = jax.jit(lambda: run.fresh_state().params)()  # without the optimizer's state: sooner
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def first(text: Path) -> tuple[setup.Run, Weights]:
    run = prepared(text, **FIRST)
    return run, weights(run)


def compared(one: Weights, other: Weights) -> tuple[set[str], set[str]]:
    """Arrays that both have, of one shape and not constant: those that are equal, and the rest."""
    common = {n for n in one.keys() & other.keys() if one[n].shape == other[n].shape}
    drawn = {name for name in common if np.unique(one[name]).size > 1}
    equal = {name for name in drawn if np.array_equal(one[name], other[name])}
    return equal, drawn - equal


QUICK = ("base", "dense_ffn")


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OTHERS]
)
def test_the_same_seed_starts_every_gate_alike(
    name: str, text: Path, first: tuple[setup.Run, Weights]
):
    run, own = first
    other = prepared(text, **OTHERS[name])
    for step in (0, 7):
        batch, others = run.data.train_batch(step), other.data.train_batch(step)
        assert all(np.array_equal(batch[key], others[key]) for key in batch)
    equal, unequal = compared(own, weights(other))
    assert all("router" in path for path in unequal), unequal
    kinds = ("embed", "attention") + (("up_EDF", "down_EFD") if name != "dense_ffn" else ())
    for kind in kinds:
        assert any(kind in path for path in equal), (kind, equal)


def test_another_seed_gives_other_weights_and_batches(text: Path, first: tuple[setup.Run, Weights]):
    run, own = first
    other = prepared(text, seed=6, **FIRST)
    assert not np.array_equal(
        run.data.train_batch(0)["tokens"], other.data.train_batch(0)["tokens"]
    )
    equal, unequal = compared(own, weights(other))
    assert not equal and len(unequal) > 5
