"""Effects of recomputation policies: memory, values computed or sent twice; results are equal."""

import collections
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import stack
from moejax.train.cost.budget import count_budget
from tests import meshes, steps
from tests.hlo import Collective, collectives

KEEP_EXCHANGES = ["experts", "exchange"]


class Outcome(NamedTuple):
    """A forward and backward pass of the model, and the program that ran."""

    loss: Any
    totals: Any
    gate_state: Any
    grads: Any
    collectives: list[Collective]

    @property
    def sent(self) -> collections.Counter:
        """The number of collectives of each kind."""
        return collections.Counter(c.kind for c in self.collectives)


@functools.cache
def outcome(remat: str, transport: str = "cells", gate: str = "shazeer", **changes: Any) -> Outcome:
    """On eight devices, with the layers in a loop, as they are whenever something is recomputed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "MOST_UNROLLED", 0)
        choices = {"model__remat": remat, "moe__transport": transport, **changes}
        run = steps.make(meshes.LARGE, gate, **choices)
        gate_state = run.task.init_gate_state()

        def loss(params, batch):
            totals = run.task.forward(
                params, gate_state, batch, jnp.int32(0), jax.random.key(0), train=True
            )
            return run.task.objective(totals, totals.items), totals

        with jax.set_mesh(run.mesh):
            args = run.init_state().params, run.put(steps.batch(0))
            program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*args).compile()
            (value, totals), grads = jax.device_get(program(*args))
    found = collectives(program.as_text(), run.mesh)
    return Outcome(value, totals, run.task.update_gate_state(gate_state, totals), grads, found)


def same(got: Outcome, wanted: Outcome) -> None:
    # The same operations on the same numbers, fused in another way.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, (got.loss, got.grads), (wanted.loss, wanted.grads))
    for field in ("tokens", "load_E", "dropped_E", "dropped_L", "unserved_tokens"):
        counts = [getattr(outcome.totals.stats, field) for outcome in (got, wanted)]
        np.testing.assert_array_equal(*counts)
    jax.tree.map(np.testing.assert_array_equal, got.gate_state, wanted.gate_state)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["experts", "exchange", "full"])
def test_on_a_mesh_loss_gradients_and_counts_are_those_without_recomputation(remat):
    same(outcome(remat), outcome("none"))
    assert outcome("none").totals.stats.dropped_E.sum() > 0


RECOMPUTING = [*KEEP_EXCHANGES, "dots", "full"]
GATES = [
    ("tests.steps:Biased", {}),
    ("sbase", {"transport": "dropless", "moe__group": "batch"}),
    ("base", {"transport": "dropless_once", "moe__group": "batch"}),
    ("top_k", {"transport": "gather"}),
    ("dense", {"transport": "all_experts"}),
]
PAIRS = [(*gate, RECOMPUTING[i % 4]) for i, gate in enumerate(GATES)]


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "changes", "remat"), PAIRS, ids=str)
def test_recomputation_changes_no_result_of_stateful_gates_and_all_transports(gate, changes, remat):
    got, wanted = (outcome(r, gate=gate, **changes) for r in (remat, "none"))
    same(got, wanted)
    if gate == "tests.steps:Biased":
        assert np.abs(jax.tree.leaves(got.gate_state)[0]).max() > 0


@pytest.mark.slow
def test_policies_that_keep_exchanged_rows_send_nothing_twice():
    """Two exchanges each way; a backward pass that starts from nothing repeats those forward."""
    sent = {remat: outcome(remat).sent["all-to-all"] for remat in stack.REMAT if remat != "dots"}
    assert sent == {"none": 4, "experts": 4, "exchange": 4, "full": 6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "remat"),
    [("dropless", "exchange"), ("dropless_once", "experts"), ("gather", "exchange")],
)
def test_no_other_transport_sends_anything_twice_either(transport, remat):
    """On CPU a ragged exchange is an all-gather and all-to-alls of offsets."""
    got, wanted, full = (outcome(r, transport, gate="top_k").sent for r in (remat, "none", "full"))
    for kind in ("all-to-all", "all-gather", "reduce-scatter"):
        assert got[kind] <= wanted[kind]
    assert full["all-gather"] > wanted["all-gather"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("remat", KEEP_EXCHANGES)
def test_sinkhorn_over_the_batch_is_not_run_twice(remat):
    """Its column sums, one number for each of 8 experts, cross the mesh once an iteration."""
    got, wanted, full = (
        [c.sizes for c in outcome(r, "dropless", gate="sbase", moe__group="batch").collectives]
        for r in (remat, "none", "full")
    )
    assert got.count((8,)) == wanted.count((8,)) > 0
    assert full.count((8,)) == 2 * wanted.count((8,))


@pytest.mark.slow
def test_experts_keeps_the_hidden_layers_on_top_of_what_exchange_keeps():
    """Gate and up of every row; the output has come back by the exchange, which both keep."""
    layers, rows = 2, steps.BATCH * steps.LENGTH * 2 // 8
    hidden = layers * rows * 2 * steps.F * 4
    kept = [
        count_budget(steps.make(meshes.LARGE, model__remat=remat)).activation_bytes
        for remat in KEEP_EXCHANGES
    ]
    assert kept[0] - kept[1] == pytest.approx(hidden, abs=1)  # rounded down to bytes per device
