"""Promise 1: the same config and seed train the same on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import meshes, steps

STEPS = 5
GATES = {
    "top_k": {},
    "shazeer": {"moe__transport": "cells"},  # the published model drops nothing
    "tests.steps:Biased": {"moe__losses__load_balance": 0.1},
    "base": {"moe__group": "batch", "moe__transport": "dropless"},
    "sbase": {"moe__gate__evaluation": "ema"},
    "switch": {  # dense, then (dense, MoE) twice: whatever can differ between layers
        "model__num_layers": 5,
        "moe__every": 2,
        "moe__first_dense": 1,
        "moe__shared_experts": 1,
        "moe__balance_scope": "batch",
        "model__tie_embeddings": False,
        "model__remat": "dots",
        "optim__name": "muon",
    },
}
BALANCED_IN_TRAINING = ("base", "sbase")
"""Gates whose routing depends on prices, not on a token's logits alone; BASE drops nothing."""

MESHES = [
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"data": 4, "expert": 2},
    {"data": 8},
    {"fsdp": 4, "expert": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 4, "tensor": 2},
    {"data": 2, "tensor": 4},
]
MARGIN = 1e-5
"""The distance of a token's k-th and next logit above which rounding has no effect; on these meshes
it moves losses by 1e-6."""


class Trace:
    """Five steps: loss and gradient norm by step, routing by step, layer and token."""

    def __init__(self, metrics, routings, state):
        totals = [m["totals"] for m in metrics]
        self.loss = np.array([t.loss / t.items for t in totals])
        self.total_loss = np.array([m["total_loss"] for m in metrics])
        self.grad_norm = np.array([m["grad_norm"] for m in metrics])
        self.auxiliary = [{k: v / t.items for k, v in t.auxiliary.items()} for t in totals]
        self.load = np.array([t.stats.load_E for t in totals])
        self.dropped = np.array([t.stats.dropped_E for t in totals])
        self.expert, self.kept, self.margin = (
            np.array([routing[name] for routing in routings])
            for name in ("expert", "kept", "margin")
        )
        self.gate_state = jax.device_get(state.gate_state)
        self.split_copies = split_copies(state)


def split_copies(state) -> list[str]:
    """Arrays of which two devices hold copies that differ in any bit."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        copies: dict[str, set[bytes]] = {}
        for shard in x.addressable_shards:
            copies.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
        if max(map(len, copies.values())) > 1:
            found.append(jax.tree_util.keystr(path))
    return found


def routing_of(x_BLD, info):
    """For each token of a layer: its experts, which of them had room, and how far its k-th logit
    lies above the next; the last only where the token is valid."""
    active_GTK = info.routing.weight_GTK > 0
    k = active_GTK.shape[-1]
    top_GTK, _ = jax.lax.top_k(jnp.log(info.router.probs_GTE), k + 1)
    routing = {
        "expert": jnp.where(active_GTK, info.routing.expert_GTK, -1),
        "kept": info.kept_GTK & active_GTK,
        "margin": top_GTK[..., k - 1] - top_GTK[..., k],
    }
    return {name: x.reshape(*x_BLD.shape[:2], -1) for name, x in routing.items()}


@functools.cache
def trained(mesh: tuple[tuple[str, int], ...], gate: str) -> Trace:
    jax.clear_caches()  # programs of other meshes are of no more use, and a process holds so many
    # With this seed no token comes near a tie: see `check_it_was_a_test`.
    run = steps.make(dict(mesh), gate, moe__d_ff=24, train__seed=1, **GATES[gate])

    @jax.jit
    def watched(state, batch):
        key = jax.random.wrap_key_data(state.key)
        args = state.params, state.gate_state, batch, state.step, key
        return run.task.apply(*args, train=True, tap=routing_of)[1].taps

    with jax.set_mesh(run.mesh):
        state, metrics, routings = run.init_state(), [], []
        for step in range(STEPS):
            batch = steps.batch(step)
            routing = jax.device_get(watched(state, run.put(batch)))
            valid_BL1 = batch["valid"][..., None]
            routings.append({**routing, "margin": np.where(valid_BL1, routing["margin"], np.inf)})
            state, seen = run.train_step(state, run.put(batch))
            metrics.append(jax.device_get(seen))
        return Trace(metrics, routings, state)


def check_equal(shape, gate):
    got, wanted = trained(tuple(shape.items()), gate), trained((("data", 1),), gate)
    np.testing.assert_array_equal(got.expert, wanted.expert)
    np.testing.assert_array_equal(got.kept, wanted.kept)
    np.testing.assert_array_equal(got.load, wanted.load)
    np.testing.assert_array_equal(got.dropped, wanted.dropped)
    # Counts make Biased's state, sums of logits (reduced in another order) that of S-BASE.
    state_close = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=1e-6 if gate == "sbase" else 0
    )
    jax.tree.map(state_close, got.gate_state, wanted.gate_state)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(got.loss, wanted.loss)
    close(got.total_loss, wanted.total_loss)
    close(got.grad_norm, wanted.grad_norm)
    jax.tree.map(close, got.auxiliary, wanted.auxiliary)
    assert not got.split_copies, "devices that hold one weight must update it alike"


def check_it_was_a_test(gate):
    """Pairs are dropped in every step and layer, most experts are visited, and no token is so close
    to a tie that rounding could decide: all five steps must route alike, not only the first."""
    alone = trained((("data", 1),), gate)
    assert len(set(alone.loss)) == STEPS
    if gate not in ("shazeer", *BALANCED_IN_TRAINING):  # noise or prices decide, beside the logits
        assert alone.margin.min() > MARGIN
    assert (alone.dropped.sum(-1) > 0).all() or gate == "base"
    assert ((alone.load > 0).sum(-1) > 4).all()
    if gate == "base":
        assert (np.ptp(alone.load, axis=-1) <= 1).all() and not alone.dropped.any()
    if gate == "sbase":
        assert np.abs(alone.gate_state["bias_E"]).max() > 1e-3
    if gate.endswith("Biased"):
        assert alone.gate_state.shape == (2, 8) and np.abs(alone.gate_state).max() > 0.01


NAMES = list(GATES)
PAIRS = [
    (shape, NAMES[(i + j) % len(NAMES)])
    for j, shapes in ((0, MESHES), (2, MESHES[4:]))
    for i, shape in enumerate(shapes)
]
"""Every gate on two meshes. Every mesh has one gate, and those of fsdp or tensor have two."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "gate"),
    [pytest.param(*pair, id=f"{pair[1]}-{meshes.name(pair[0])}") for pair in PAIRS],
)
def test_five_steps_are_the_same_on_every_mesh(shape, gate):
    check_it_was_a_test(gate)
    check_equal(shape, gate)
