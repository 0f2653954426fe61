"""What a token may see, proven by perturbation in both directions.

Routing is piecewise constant, so gradients show nothing: later tokens (or other sequences) are
replaced by unrelated ones and earlier outputs must not move at all; where a leak is declared, they
must move for some seed.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating

B, L, D, E = 4, 12, 8, 4
SEEDS = 24

CASES = [
    pytest.param(
        gate, fields, priority, group, id=f"{gate}{fields.get('k', '')}-{priority}-{group}"
    )
    for (gate, fields), (priority, group) in itertools.product(
        [
            ("switch", {}),
            ("mixtral", {"k": 2}),
            ("top_k", {"k": 3}),
            ("shazeer", {"k": 2}),
            ("gshard", {}),
            ("dense", {}),
            ("base", {}),
            ("sbase", {"k": 2}),
            ("sbase", {"rounding": "balanced"}),
            ("dselect_k", {"k": 1}),
            ("dselect_k", {"k": 2, "max_active": 2}),
        ],
        [
            ("position", "sequence"),
            ("choice", "sequence"),
            ("gate", "sequence"),
            ("random", "sequence"),
            ("position", "2"),
            ("gate", "4"),
        ],
    )
]


def balances(gate, fields):
    """Whether the gate fills every slot in training, exactly."""
    return gate == "base" or fields.get("rounding") == "balanced"


@functools.cache
def program(gate, fields, priority, group, train, factor=0.6):
    """[SEEDS] runs at once: output with the given tokens, drops on the way."""
    layer = moejax.MoE(
        D,
        8,
        E,
        gate=gating.make(gate, **dict(fields)),
        transport="cells",
        eval_transport="cells",
        capacity_factor=factor,
        eval_capacity_factor=factor,
        priority=priority,
        group=group,
        rngs=nnx.Rngs(0),
    )
    if "router_DE" in layer.router:
        layer.router["router_DE"][...] = jax.random.normal(jax.random.key(9), (D, E))
    else:  # DSelect-k with bits decided, or every token would visit every expert
        layer.router["code_MDZ"][...] = layer.router["code_MDZ"][...] * 200
    visibility = layer.gate.visibility(layer.config)

    def once(x, key):
        y, info = layer(x, moejax.Context.of(B, L, key=key), train=train)
        return y, info.stats.dropped_E.sum()

    return jax.jit(jax.vmap(once)), visibility


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("gate", "fields", "priority", "group"), CASES)
def test_a_token_sees_what_its_gate_declares(gate, fields, priority, group, train):
    run, declared = program(gate, tuple(fields.items()), priority, group, train)
    dropped = check(run, declared, train)
    if not (gate == "dense" or (train and balances(gate, fields))):
        assert (dropped > 0).all(), "a capacity that never binds proves nothing"


@pytest.mark.parametrize("priority", ["choice", "gate", "random"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_capacity_shows_tokens_to_each_other_below_e_over_k_and_not_from_there_on(k, priority):
    """At the factor of perfect balance, and at the least that never binds."""
    fields = (("k", k), ("renormalize", False))
    for factor, binds in ((1.0, True), (E / k, False)):
        run, declared = program("top_k", fields, priority, "2", True, factor)
        assert (check(run, declared, train=True) > 0).any() == binds
        assert any(declared) == binds


def check(run, declared, train):
    """Perturbs and compares with what is declared; pairs dropped on the way, by seed."""
    keys = jax.random.split(jax.random.key(0), SEEDS)
    x = jax.random.normal(jax.random.key(1), (SEEDS, B, L, D))
    other = jax.random.normal(jax.random.key(2), x.shape)
    y, dropped = run(x, keys)

    cut = L // 2
    later = x.at[:, 1, cut:].set(other[:, 1, cut:])
    moved_by_future = np.abs(run(later, keys)[0] - y)[:, 1, :cut].max()
    sequence = x.at[:, 1:].set(other[:, 1:]), x.at[:, :-1].set(other[:, :-1])
    moved_by_others = max(
        np.abs(run(sequence[0], keys)[0] - y)[:, 0].max(),
        np.abs(run(sequence[1], keys)[0] - y)[:, -1].max(),
    )
    future, others = (
        (declared.train_future, declared.train_others)
        if train
        else (declared.eval_future, declared.eval_others)
    )
    # Same program, same sums: what is not seen moves nothing, to the last bit but the ulp that a
    # matmul over other rows may differ by.
    for moved, is_declared in ((moved_by_future, future), (moved_by_others, others)):
        assert (moved > 1e-3) if is_declared else (moved < 1e-6), (moved, is_declared)
    return dropped


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("gate", "fields"), [("base", {}), ("sbase", {"k": 1})])
def test_a_balanced_batch_sees_every_sequence_in_training_and_none_in_evaluation(
    gate, fields, train
):
    """Without capacity: the leak is the assignment's own."""
    layer = moejax.MoE(D, 8, E, gate=gating.make(gate, **fields), transport="dropless",
                       group="batch", rngs=nnx.Rngs(0))  # fmt: skip
    layer.router["router_DE"][...] = jax.random.normal(jax.random.key(9), (D, E))
    run = jax.jit(jax.vmap(lambda x: layer(x, train=train)[0]))
    x = jax.random.normal(jax.random.key(1), (SEEDS, B, L, D))
    other = jax.random.normal(jax.random.key(2), x.shape)
    y = run(x)
    seen = layer.gate.visibility(layer.config)
    later = np.abs(run(x.at[:, 1, 6:].set(other[:, 1, 6:])) - y)[:, 1, :6].max()
    others = np.abs(run(x.at[:, 1:].set(other[:, 1:])) - y)[:, 0].max()
    for moved, declared in (
        (later, seen.train_future if train else seen.eval_future),
        (others, seen.train_others if train else seen.eval_others),
    ):
        assert declared == train and ((moved > 1e-3) if declared else (moved < 1e-6))


@pytest.mark.parametrize("priority", ["position", "gate"])
def test_dropless_evaluation_is_causal_whatever_training_does(priority):
    moe = moejax.types.MoEConfig(E, capacity_factor=0.6, priority=priority, group="2")
    seen = gating.make("mixtral").visibility(moe)
    assert not seen.eval_future and not seen.eval_others
