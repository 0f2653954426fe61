"""Hash layers: tables as dictionaries, greedy balance, hashes of pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.gating import balanced_table
from moejax.types import Context, GateSpec
from tests import gates
from tests.gates import D, E, G, T, V


def states(layers=3, experts=E, **fields):
    """States of several layers at once, as a stacked model makes them: the layer is traced."""
    gate = gating.make("hash", **fields)

    def one(layer):
        return gate.init_state(GateSpec(D, experts, V, layer, token_counts=gates.token_counts))

    return gate, jax.vmap(one)(jnp.arange(layers))


def route(gate, state, given):
    return gate({}, state, gates.tokens(), given).routing


@pytest.mark.quick(2)
@pytest.mark.parametrize("table", ["random", "balanced"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_routing_is_a_lookup_in_one_dictionary_per_column(table, k):
    gate, stacked = states(table=table, k=k)
    given = gates.context(False)
    for layer in range(3):
        state = jax.tree.map(lambda x, layer=layer: x[layer], stacked)
        books = [dict(enumerate(column)) for column in np.asarray(state["table_KV"]).tolist()]
        routing = route(gate, state, given)
        for group, token in np.ndindex(G, T):
            key = int(given.token_GT[group, token])
            assert routing.expert_GTK[group, token].tolist() == [book[key] for book in books]
        assert (routing.weight_GTK == 1).all()
        block = E // k
        assert (routing.expert_GTK // block == jnp.arange(k)).all(), "column j uses block j"


@pytest.mark.parametrize("table", ["random", "balanced"])
def test_each_layer_column_and_seed_has_its_own_table(table):
    tables = {
        tuple(np.asarray(column % 4).tolist())  # within a block of 4
        for seed in (0, 1)
        for layer in states(table=table, k=2, seed=seed)[1]["table_KV"]
        for column in layer
    }
    assert len(tables) == 2 * 3 * 2
    partitions = {
        frozenset(frozenset(i for i, e in enumerate(row) if e == expert) for expert in range(4))
        for row in tables
    }
    assert len(partitions) == len(tables), "not merely other names for the same experts"


def by_hand(counts, experts):
    """Longest processing time first, in Python."""
    load, ids, table = [0] * experts, [0] * experts, [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        pick = min(range(experts), key=lambda e: (load[e] if counts[token] else ids[e], e))
        table[token] = pick
        load[pick] += counts[token]
        ids[pick] += 1
    return table


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_a_balanced_table_is_greedy_and_keeps_the_bound_of_list_scheduling(experts):
    rng = np.random.default_rng(experts)
    deal = jax.jit(functools.partial(balanced_table, num_experts=experts))
    shuffled = jax.jit(lambda counts, key: balanced_table(counts, experts, key))
    for trial in range(5):
        counts = rng.zipf(1.3, 200).clip(0, 10_000) * (rng.random(200) < 0.8)
        table = deal(jnp.asarray(counts, jnp.int32))
        assert table.tolist() == by_hand(counts.tolist(), experts)
        other = shuffled(jnp.asarray(counts, jnp.int32), jax.random.key(trial))
        for found in (table, other):
            load = np.bincount(found, weights=counts, minlength=experts)
            assert load.max() <= counts.mean() * 200 / experts + counts.max()
            ids_unused = np.bincount(found[counts == 0], minlength=experts)
            assert (counts == 0).sum() == ids_unused.sum() > 0
            total_ids = np.bincount(found, minlength=experts)
            assert ids_unused.max() <= max(total_ids.min(), 1) + 1, "unused ids fill up the rest"
        assert experts == 1 or other.tolist() != table.tolist()


def test_balanced_beats_random_on_skewed_text():
    gate, balanced = states(layers=8, table="balanced", experts=4)
    _, random = states(layers=8, table="random", experts=4)
    counts = gates.token_counts()

    def worst(stacked):
        loads = [np.bincount(t[0], weights=counts, minlength=4) for t in stacked["table_KV"]]
        return np.mean([load.max() / load.mean() for load in loads])

    assert worst(balanced) < 1.1 < 1.3 < worst(random)
    assert gate.trained_by == "none" and gate.init(jax.random.key(0), gates.spec()) == {}


def test_counts_beyond_int32_keep_their_proportions():
    gate = gating.make("hash", table="balanced")

    def table(scale):
        counts = gates.token_counts() * scale
        return gate.init_state(GateSpec(D, E, V, token_counts=lambda: counts))["table_KV"]

    np.testing.assert_array_equal(table(2**40), table(1))


def test_a_table_without_its_inputs_is_refused_with_a_remedy():
    balanced = gating.make("hash", table="balanced")
    with pytest.raises(ValueError, match=r"init_gate_state\(token_counts=.*gate.table=random"):
        balanced.init_state(GateSpec(D, E, V))
    with pytest.raises(ValueError, match=r"vocab_size=32 ids; token_counts has shape \(3,\)"):
        balanced.init_state(GateSpec(D, E, V, token_counts=lambda: np.ones(3)))
    with pytest.raises(ValueError, match="vocab_size=0; pass vocab_size"):
        gating.make("hash").init_state(GateSpec(D, E))
    with pytest.raises(ValueError, match="gate.k=3 tables cannot share num_experts=8"):
        gating.make("hash", k=3).check(8, train=True)


def bigrams(token_BL, rows=1, layer=0, **known):
    gate, stacked = states(table="bigram", k=2)
    state = jax.tree.map(lambda x: x[layer], stacked)
    given = Context.of(*token_BL.shape, token_BL=token_BL, **known).grouped(rows, False)
    x = jnp.zeros((*given.token_GT.shape, D))
    return gate({}, state, x, given).routing.expert_GTK.reshape(*token_BL.shape, 2)


def test_a_bigram_hash_is_a_dictionary_of_pairs():
    token = jax.random.randint(jax.random.key(0), (8, 64), 0, 6)
    segment = jnp.arange(64) // 20 + jnp.zeros((8, 1), jnp.int32)
    valid = jnp.arange(64) >= jnp.arange(8)[:, None]  # padding on the left, and in between
    valid &= jnp.arange(64) % 7 != jnp.arange(8)[:, None]
    given = token, segment, valid
    expert = np.asarray(bigrams(token, segment_BL=segment, valid_BL=valid))
    token, segment, valid = map(np.asarray, given)
    book = {}
    for b, t in zip(*np.nonzero(valid), strict=True):
        before = np.flatnonzero(valid[b, :t])[-1:]
        alone = not before.size or segment[b, t] != segment[b, before[0]]
        key = (None if alone else int(token[b, before[0]]), int(token[b, t]))
        assert book.setdefault(key, expert[b, t].tolist()) == expert[b, t].tolist()
    assert len(book) == 6 * 7 and len({tuple(v) for v in book.values()}) > 8
    # The same in groups of several sequences: rows do not follow each other.
    token, segment, valid = given
    grouped = bigrams(token, rows=4, segment_BL=segment, valid_BL=valid)
    np.testing.assert_array_equal(expert, grouped)


def test_bigrams_spread_evenly_and_differently_in_every_layer_and_column():
    token = jax.random.randint(jax.random.key(1), (16, 512), 0, V)
    experts = [np.asarray(bigrams(token, layer=layer)) for layer in (0, 1)]
    columns = [column for e in experts for column in (e[..., 0], e[..., 1] - E // 2)]
    pairs = 16 * 512
    for column in columns:
        share = np.bincount(column.ravel(), minlength=4) / pairs
        # 1024 bigrams of 8 occurrences each: std of a share is sqrt(3/16/1024) = 0.0135; 5 of them.
        np.testing.assert_allclose(share, 0.25, atol=0.07)
    for i in range(4):
        for j in range(i):
            agree = (columns[i] == columns[j]).mean()
            assert abs(agree - 0.25) < 0.07, "independent hashes agree one time in four"


def test_multi_hash_is_one_wide_ffn_whose_segments_are_looked_up():
    width, hidden = D, 6
    gate, stacked = states(layers=1, table="random", k=2, experts=4)
    state = jax.tree.map(lambda x: x[0], stacked)
    layer = moejax.MoE(width, hidden, 4, gate=gate, activation="relu", transport="dropless",
                       vocab_size=V, rngs=nnx.Rngs(0))  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (2, 8, width))
    token = jax.random.randint(jax.random.key(2), (2, 8), 0, V)
    y, _ = layer(x, Context.of(2, 8, token_BL=token), state)
    up, down = np.asarray(layer.up_EDF[...]), np.asarray(layer.down_EFD[...])
    for b, t in np.ndindex(2, 8):
        picks = np.asarray(state["table_KV"])[:, token[b, t]]
        wide_up = np.concatenate([up[e] for e in picks], axis=1)
        wide_down = np.concatenate([down[e] for e in picks], axis=0)
        wanted = np.maximum(np.asarray(x[b, t]) @ wide_up, 0) @ wide_down
        np.testing.assert_allclose(y[b, t], wanted, rtol=1e-4, atol=1e-5)  # float32 sums
