"""Every gate under the settings of a program around it: 64-bit numbers, strict promotion."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from tests import gates
from tests.gates import ROWS, TASKS, D, E, Row, T, V

QUICK = ("sbase-rounding=balanced", "shazeer", "thor", "gating_dropout-local_share=0.5", "base")
PARAMS = [
    pytest.param(row, id=row.name, marks=[] if row.name.startswith(QUICK) else pytest.mark.slow)
    for row in ROWS
]


@pytest.mark.quick(2)
@pytest.mark.parametrize("row", PARAMS)
def test_routing_is_the_same_under_64_bit_numbers(row: Row):
    gate = row.make()
    known = (gates.drawn(gate), gate.init_state(gates.spec()), gates.tokens())
    for train in (True, False):
        given = gates.context(train, step=row.step, keyed=train or row.noisy_eval)
        wanted = jax.device_get(gates.program(row)(*known, given))
        with jax.enable_x64(True):
            got = gates.program(row)(*known, given)
        wide = {str(x.dtype) for x in jax.tree.leaves(got)} & {"float64", "int64", "uint64"}
        assert not wide
        np.testing.assert_array_equal(got.routing.expert_GTK, wanted.routing.expert_GTK)
        np.testing.assert_allclose(got.routing.weight_GTK, wanted.routing.weight_GTK, rtol=1e-5)


SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
}


def traced_layer(row: Row, setting: str, transport: str) -> None:
    """A layer built, differentiated and moved on by one step, as shapes, under a setting."""
    known: dict[str, Any] = {"vocab_size": V, "num_tasks": TASKS, "num_shared": 1}
    with SETTINGS.get(setting, contextlib.nullcontext)():
        layer = moejax.MoE(
            D, 16, E, gate=row.make(), transport=transport, **known, rngs=nnx.Rngs(0)
        )
        assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(layer))} <= {"float32", "uint32"}
        state = layer.init_gate_state(token_counts=gates.token_counts)
        graph, params = nnx.split(layer)
        x_BLD = jnp.ones((2, T, D), jnp.float32)
        ids_BL = jnp.zeros((2, T), jnp.int32)
        context = moejax.Context.of(2, T, token_BL=ids_BL, key=jax.random.key(0))

        def loss(params, x_BLD):
            own = nnx.merge(graph, params)
            y_BLD, info = own(x_BLD, context, state, True)
            total = jnp.mean(y_BLD) + sum(info.losses.values())
            return total, (y_BLD, own.update_gate_state(state, info.stats))

        grads, (y_BLD, after) = jax.eval_shape(jax.grad(loss, has_aux=True), params, x_BLD)
        assert y_BLD.dtype == jnp.float32
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
        assert all(jax.tree.leaves(same)), "one program for all steps"
        assert {str(x.dtype) for x in jax.tree.leaves(grads)} <= {"float32", "float0"}


@pytest.mark.quick(3)
@pytest.mark.parametrize("row", PARAMS)
@pytest.mark.parametrize("setting", [*SETTINGS])
def test_a_layer_with_any_gate_can_be_traced_under_any_setting(row: Row, setting: str):
    traced_layer(row, setting, "cells")


@pytest.mark.slow
@pytest.mark.parametrize("setting", [*SETTINGS])
@pytest.mark.parametrize("transport", ["dropless", "dropless_once", "gather", "all_experts"])
def test_every_transport_can_be_traced_under_any_setting(transport: str, setting: str):
    (row,) = (row for row in ROWS if row.name == "mixtral")
    traced_layer(row, setting, transport)
