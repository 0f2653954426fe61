"""experiments/minimal_lm.py: the loss that its docstring states, and the shapes of its step."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from experiments import minimal_lm
from tests.environment import of_a_user

ROOT = Path(__file__).parents[2]
STATED = {
    name: float(value)
    for name, value in zip(
        ("model", "bigram", "trigram"),
        re.findall(r"\b\d\.\d{3}\b", minimal_lm.__doc__ or ""),
        strict=True,
    )
}


def test_a_step_keeps_the_shapes_of_its_state():
    graph, params = nnx.split(minimal_lm.LM(rngs=nnx.Rngs(0)))
    gate_states = [block.moe.init_gate_state() for block in nnx.merge(graph, params).blocks]
    optimizer = optax.adamw(1e-3)
    train_step, _ = minimal_lm.make_steps(graph, optimizer)
    state = (params, optimizer.init(params), gate_states)
    row_BL = jnp.zeros((minimal_lm.BATCH, minimal_lm.LENGTH + 1), jnp.int32)
    *after, metrics = jax.eval_shape(train_step, *state, row_BL)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(list(state)) == shapes(after)
    assert metrics["loss"].shape == ()
    assert [bias["bias_E"].shape for bias in gate_states] == [(minimal_lm.EXPERTS,)] * 3


@pytest.mark.slow
def test_300_steps_reach_the_stated_loss_and_beat_a_trigram_model(tmp_path):
    """In its own process, with the single device of a reader."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "minimal_lm.py"), "--steps", "300"],
        cwd=tmp_path,
        env={**of_a_user(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    last = ended.stdout.splitlines()[-1]
    losses = {k: float(v) for k, v in re.findall(r"(\w+) (\d\.\d{3})", last)}
    assert set(losses) == set(STATED)
    assert losses["model"] < losses["trigram"] - 0.1 < losses["bigram"]
    # Other Python versions have another standard library; another processor rounds differently.
    assert all(abs(losses[name] - STATED[name]) < 0.05 for name in losses), losses
