"""The visibility of each gate, proven by perturbation in both directions.

Routing is piecewise constant, so gradients show nothing: later tokens (or other sequences) are
replaced by unrelated ones and earlier outputs must not move at all; where a leak is declared, they
must move for some seed.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.options import DispatchOptions
from tests import gates
from tests.claims import Claims
from tests.gates import ROWS, TASKS, D, E, V

B, L = 4, 12
SEEDS = 24
QUICK = ("position", "sequence"), ("gate", "4")
"""Priority and group: a priority that hides later tokens where capacity does, and one that hides
nothing, in a group of several sequences."""
SLOW = [("choice", "sequence"), ("gate", "sequence"), ("random", "sequence"), ("position", "2")]

forget = gates.forgetting()
both_phases = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@functools.cache
def program(row, priority, group, train, factor=0.6, reroute=0):
    """[SEEDS] runs at once: output with the given tokens, drops on the way."""
    layer = moejax.MoE(
        D,
        8,
        E,
        gate=row.make(),
        transport="cells",
        eval_transport="cells",
        capacity_factor=factor,
        eval_capacity_factor=factor,
        priority=priority,
        group=group,
        reroute=reroute,
        vocab_size=V,
        num_tasks=TASKS,
        rngs=nnx.Rngs(0),
    )
    layer.router = nnx.data(jax.tree.map(nnx.Param, gates.drawn(layer.gate)))
    state = layer.init_gate_state(token_counts=gates.token_counts)

    def once(x, token, task, key):
        known = dict(token_BL=token, task_B=task, key=key, step=jax.numpy.int32(row.step))
        context = moejax.Context.of(B, L, **known)
        y, info = layer(x, context, state, train=train)
        return y, info.stats.dropped_E.sum()

    return jax.jit(jax.vmap(once)), layer


def seen(row, priority, group, train):
    """Perturb one row's layer, with a capacity that binds; raise if its declaration is wrong."""
    run, layer = program(row, priority, group, train)
    dropped = check(run, layer.gate.visibility(layer.config), train)
    rows = layer.config.rows_per_group(B)
    full = layer.gate.capacity(rows * L, E, 0.6) >= rows * L
    if not (full or row.never_drops or (train and row.exact_load)):
        assert (dropped > 0).any(), "a capacity that never binds proves nothing"


def quick(row):
    """Priorities and groups of the fast suite in training: of several sequences only for gates
    that look at other tokens without any capacity too."""
    moe = DispatchOptions(
        num_experts=E, capacity_factor=float(E), priority="gate", group="4"
    ).config
    return QUICK if any(row.make().visibility(moe)) or row == ROWS[0] else QUICK[:1]


def rows():
    """Quick: gates that look at other tokens without any capacity, or at their order, and the
    first of those that only capacity lets look at others."""
    for row in ROWS:
        alone = len(quick(row)) == 1 and row.equivariant
        yield pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.slow or alone))


def all_seen(row, choices, train):
    claims = Claims(f"{row.name} in {'training' if train else 'evaluation'}")
    for priority, group in choices:
        name = f"priority {priority}, group {group}"
        claims.check(seen, row, priority, group, train, name=name)
    claims.settle()


@both_phases
@pytest.mark.parametrize("row", list(rows()))
def test_a_token_depends_on_what_its_gate_declares(row, train):
    all_seen(row, quick(row) if train else QUICK[:1], train)


@pytest.mark.slow
@both_phases
@pytest.mark.parametrize("row", gates.DISTINCT)
def test_a_token_depends_on_what_its_gate_declares_with_other_choices(row, train):
    """Each slow option for a quarter of the rows, and none for rows that share their code."""
    i = ROWS.index(row)
    done = quick(row) if train else QUICK[:1]
    more = SLOW[(i if train else i + 1 + i // 4) % len(SLOW)]
    all_seen(row, [*QUICK[len(done) :], more], train)


def rerouted():
    """Quick: a gate whose overflow finds other experts, and gates without any other to find.

    A quarter of the slow rows are tried in evaluation too.
    """
    for i, row in enumerate(ROWS):
        for train in (True, False) if not row.slow else ():
            phases = {"switch": (True, False), "hash": (True,), "remoe": (True,)}
            quick = not row.fields and train in phases.get(row.gate, ())
            if not (train or quick or i % 4 == 0):
                continue
            marks = () if quick else pytest.mark.slow
            yield pytest.param(row, train, id=f"{row.name}-{train}", marks=marks)


@pytest.mark.parametrize(("row", "train"), list(rerouted()))
def test_rerouted_overflow_depends_on_later_tokens(row, train):
    run, layer = program(row, "position", "sequence", train, reroute=2)
    check(run, layer.gate.visibility(layer.config), train)


def test_only_gates_that_reroute_overflow_declare_that_it_leaks():
    flat = DispatchOptions(num_experts=E, capacity_factor=0.6, eval_transport="cells", reroute=2)
    for name, leaks in {"switch": True, "hash": False, "remoe": False, "dselect_k": False}.items():
        seen = gating.make(name).visibility(flat.config)
        assert seen.train_future == seen.eval_future == leaks


@pytest.mark.parametrize(("priority", "k"), [("choice", 1), ("gate", 2), ("random", 3)])
def test_capacity_shows_tokens_to_each_other_only_below_e_over_k(k, priority):
    """At the factor of perfect balance, and at the least that never binds."""
    row = gates.row("top_k", fields={"k": k, "renormalize": False})
    for factor, binds in ((1.0, True), (E / k, False)):
        run, layer = program(row, priority, "2", True, factor)
        declared = layer.gate.visibility(layer.config)
        assert (check(run, declared, train=True) > 0).any() == binds
        assert any(declared) == binds


@functools.cache
def inputs():
    """Tokens, ids and tasks, each with others to put in their place, and keys, of every seed."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, SEEDS, B, L, D)).astype(np.float32)
    token = rng.integers(0, V, (2, SEEDS, B, L)).astype(np.int32)
    task = rng.integers(0, TASKS, (2, SEEDS, B)).astype(np.int32)
    return x, token, task, jax.random.split(jax.random.key(0), SEEDS)


def replaced(pair, where):
    """The first of two arrays, with those entries of the second."""
    found = pair[0].copy()
    if where is not None:
        found[where] = pair[1][where]
    return found


def check(run, declared, train):
    """Perturb, and compare with what is declared; return the pairs dropped, by seed."""
    x, token, task, keys = inputs()
    y, dropped = jax.device_get(run(x[0], token[0], task[0], keys))

    def moved(where, tasks=None):
        """Largest change of each position when ``where`` holds other tokens, of other tasks."""
        changed = replaced(x, where), replaced(token, where), replaced(task, tasks)
        return np.abs(run(*changed, keys)[0] - y)

    cut = L // 2
    moved_by_future = moved(np.s_[:, 1, cut:])[:, 1, :cut].max()
    first, last = np.s_[:, :-1], np.s_[:, 1:]
    moved_by_others = max(moved(last, last)[:, 0].max(), moved(first, first)[:, -1].max())
    future, others = (
        (declared.train_future, declared.train_others)
        if train
        else (declared.eval_future, declared.eval_others)
    )
    # Same program, same sums: what is not seen moves nothing, to the last bit but the ulp that a
    # matmul over other rows may differ by.
    for name, change, is_declared in (
        ("later tokens", moved_by_future, future),
        ("other sequences", moved_by_others, others),
    ):
        right = change > 1e-3 if is_declared else change < 1e-6
        assert right, f"{name} move the output by {change}; declared: {is_declared}"
    return dropped


@both_phases
@pytest.mark.parametrize(("gate", "fields"), [("base", {}), ("sbase", {"k": 1})])
def test_a_balanced_batch_mixes_sequences_in_training_and_not_in_evaluation(gate, fields, train):
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
    moe = DispatchOptions(num_experts=E, capacity_factor=0.6, priority=priority, group="2").config
    seen = gating.make("mixtral").visibility(moe)
    assert not seen.eval_future and not seen.eval_others
