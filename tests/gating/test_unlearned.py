"""Gates without a router: random, THOR's and forced routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import moejax
from moejax import experts, gating
from moejax.gating.forced import zipf_inclusion
from moejax.types import Context, GateSpec

D, E = 4, 8


def call(name, batch=4, length=64, train=True, key: int | None = 0, rows=1, **fields):
    gate = gating.make(name, **fields)
    state = gate.init_state(GateSpec(D, E))
    context = Context.of(batch, length, key=None if key is None else jax.random.key(key))
    x = jnp.zeros((batch // rows, rows * length, D))
    return gate({}, state, x, context.grouped(rows, train)).routing


# random


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_random_draws_k_distinct_experts_uniformly(train, k):
    routing = call("random", length=1000, train=train, k=k)
    expert = np.asarray(routing.expert_GTK).reshape(-1, k)
    assert all(len(set(row)) == k for row in expert)
    assert (routing.weight_GTK == np.float32(1 / k)).all()
    # Whole sets are uniform: each of the E choose k.
    codes = (1 << expert).sum(-1)
    counts = np.unique_counts(codes).counts
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert len(counts) == round(scipy.special.comb(E, k))


def test_random_draws_differ_between_keys_and_repeat_with_the_same_key():
    one, again, other = (call("random", key=key).expert_GTK for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5


# thor


def test_thor_uses_one_expert_per_step_and_all_experts_equally_often():
    drawn = [call("thor", batch=2, length=3, key=key).expert_GTK for key in range(200)]
    firsts = [int(expert.ravel()[0]) for expert in drawn]
    assert all((e == first).all() for e, first in zip(drawn, firsts, strict=True))
    assert scipy.stats.chisquare(np.bincount(firsts, minlength=E)).pvalue > 1e-3


def test_thors_draw_is_the_same_in_every_part_of_a_batch():
    gate = gating.make("thor")
    whole = Context.of(4, 3, key=jax.random.key(5))
    part = Context.of(2, 3, key=jax.random.key(5), row_B=jnp.asarray([2, 3]))
    state = gate.init_state(GateSpec(D, E))
    got = set()
    for context in (whole, part):
        x = jnp.zeros((len(context.row_B), 3, D))
        got |= set(np.ravel(gate({}, state, x, context.grouped(1, True)).routing.expert_GTK))
    assert len(got) == 1


@pytest.mark.slow
def test_thor_evaluates_with_an_expert_per_token_or_per_sequence():
    token = call("thor", length=2000, train=False).expert_GTK
    assert scipy.stats.chisquare(np.bincount(token.ravel(), minlength=E)).pvalue > 1e-3
    rows = call("thor", batch=400, length=3, rows=2, train=False, evaluation="sequence").expert_GTK
    by_row = np.asarray(rows).reshape(400, 3)
    assert (by_row == by_row[:, :1]).all()
    assert scipy.stats.chisquare(np.bincount(by_row[:, 0], minlength=E)).pvalue > 1e-3


def test_thors_expert_of_a_sequence_does_not_depend_on_its_length():
    short, long = (
        call("thor", batch=50, length=length, train=False, evaluation="sequence").expert_GTK
        for length in (3, 8)
    )
    np.testing.assert_array_equal(short[:, 0], long[:, 0])


def test_a_thor_layer_uses_one_expert_in_training_and_their_mean_in_evaluation():
    gate = gating.make("thor", evaluation="mean")
    layer = moejax.MoE(D, 6, 3, gate=gate, transport="dropless", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    weights = layer.expert_weights()
    alone = [
        experts.ffn_one(jax.tree.map(lambda w, e=e: w[e], weights), x.reshape(-1, D), "swiglu")
        for e in range(3)
    ]
    y, info = layer(x, Context.of(2, 5, key=jax.random.key(0)))
    (busy,) = np.flatnonzero(info.stats.load_E)
    # float32 products, in another order.
    np.testing.assert_allclose(y.reshape(-1, D), alone[busy], rtol=1e-5, atol=1e-6)
    y, info = layer(x, train=False)
    np.testing.assert_allclose(y.reshape(-1, D), sum(alone) / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "train"), [("random", True), ("thor", True), ("thor", False)])
def test_a_draw_needs_a_key(name, train):
    with pytest.raises(ValueError, match="pass a context with a PRNG key"):
        call(name, key=None, train=train)


# forced


@pytest.mark.parametrize("k", [1, 3, 8])
def test_balanced_loads_all_experts_equally_in_every_stretch_of_tokens(k):
    expert = np.asarray(call("forced", k=k, key=None).expert_GTK)
    for group in expert:
        for start in (0, 5, 40):
            run = group[start : start + E].ravel()
            np.testing.assert_array_equal(np.bincount(run, minlength=E), k)
    assert all(len(set(row)) == k for row in expert.reshape(-1, k))


@pytest.mark.parametrize(("k", "exponent"), [(1, 1.0), (2, 1.0), (3, 2.0), (8, 1.0), (2, 0.0)])
def test_skewed_follows_zipfs_law_and_never_repeats_an_expert(k, exponent):
    """The law by water-filling: shares are capped at 1, and the rest divide the remainder."""
    wanted = np.zeros(E)
    share = 1.0 / np.arange(1, E + 1) ** exponent
    for _ in range(E + 1):
        free = wanted < 1
        if free.any():
            wanted[free] = share[free] * (k - (~free).sum()) / share[free].sum()
        wanted = np.minimum(wanted, 1)
    np.testing.assert_allclose(zipf_inclusion(E, k, exponent), wanted, rtol=1e-12)
    expert = np.asarray(
        call("forced", pattern="skewed", k=k, exponent=exponent, length=1024, key=None).expert_GTK
    )
    assert all(len(set(row)) == k for row in expert.reshape(-1, k))
    for group in expert:  # a Weyl sequence is within about log T / T of what it samples
        got = np.bincount(group.ravel(), minlength=E) / 1024
        np.testing.assert_allclose(got, wanted, atol=0.01)


def test_pattern_one_sends_all_tokens_to_the_first_k_experts():
    routing = call("forced", pattern="one", k=2, key=None)
    np.testing.assert_array_equal(routing.expert_GTK, np.broadcast_to([0, 1], (4, 64, 2)))
    assert (routing.weight_GTK == 0.5).all()


def test_forced_routing_is_the_same_in_every_step_and_phase():
    one, other = (
        call("forced", pattern="skewed", train=train, key=key).expert_GTK
        for train, key in ((True, 1), (False, None))
    )
    np.testing.assert_array_equal(one, other)
    assert (one[0] != one[1]).any(), "but not in every row"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("random", {"k": 9}),
        ("thor", {"evaluation": "best"}),
        ("forced", {"k": 0}),
        ("forced", {"pattern": "flat"}),
        ("forced", {"exponent": -1.0}),
    ],
)
def test_values_out_of_range_are_refused(name, fields):
    with pytest.raises(ValueError, match=f"gate.{next(iter(fields))}"):
        gating.make(name, **fields).check(E, train=True)
