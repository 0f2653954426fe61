"""Evaluating a whole sequence gives the logits of decoding it token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.options import DispatchOptions
from moejax.tasks.language.model import LM
from moejax.types import Context
from tests import gates, lms

B, L = 2, 8


@functools.cache
def program(row):
    """A model whose routers decide, as a function of tokens and of how many of them count."""
    moe = DispatchOptions(num_experts=gates.E).config
    settings = lms.changed(
        lms.config(), gate=row.make(), moe=moe, vocab_size=gates.V, d_model=gates.D
    )
    model = LM(settings, rngs=nnx.Rngs(3))
    layers = settings.num_moe_layers
    drawn = jax.vmap(lambda seed: gates.drawn(settings.gate, seed=seed))(jnp.arange(layers))
    model.periods.blocks[-1].ffn.router = nnx.data(jax.tree.map(nnx.Param, drawn))
    state = model.init_gate_state(gates.token_counts)

    def logits(token_BL, count):
        valid_BL = jnp.broadcast_to(jnp.arange(token_BL.shape[1]) < count, token_BL.shape)
        given = Context.of(
            *token_BL.shape,
            token_BL=token_BL,
            valid_BL=valid_BL,
            step=jnp.int32(row.step),
            key=jax.random.key(5) if row.noisy_eval else None,
        )
        return model(token_BL, given, state, False)[0]

    run = jax.jit(logits)
    return lambda *args: np.asarray(run(*args)), settings


def cases():
    """Quick: gates that look at more than a token itself in evaluation, and the first of all.

    A row whose code another row shares is left out.
    """
    moe = DispatchOptions(num_experts=gates.E).config
    for i, row in enumerate(gates.ROWS):
        alone = row.equivariant and not any(row.make().visibility(moe)) and bool(i)
        if not row.slow:
            yield pytest.param(row, id=row.name, marks=pytest.mark.slow if alone else ())


@pytest.mark.parametrize("row", list(cases()))
def test_teacher_forced_logits_equal_those_of_every_prefix(row):
    run, settings = program(row)
    rng = np.random.default_rng(1)
    token, other = rng.integers(0, gates.V, (2, B, L)).astype(np.int32)
    whole = run(token, L)
    # What comes later is padding, with other tokens in it; and once it is not there at all.
    prefixes = [run(np.where(np.arange(L) < n, token, other), n)[:, n - 1] for n in range(1, L)]
    # The same float32 sums in programs of other shapes.
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-4)
    same = [close(got, whole[:, n]) for n, got in enumerate(prefixes)]
    leaks = row.make().visibility(settings.moe).eval_future
    assert not all(same) if leaks else all(same)
    if not leaks:
        short = run(token[:, : L // 2], L // 2)
        assert close(short, whole[:, : L // 2])
