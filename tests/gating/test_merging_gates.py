"""SMEAR and Lory: which merged expert a token gets, and what it may see of its sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.experts import ffn_one
from moejax.gating import Lory, Smear
from tests import gates, meshes, moes
from tests.gates import D, E, G, T

# float32 means, norms, logits and exponentials.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def softmax(logits_E):
    exponent = np.exp(logits_E - logits_E.max())
    return exponent / exponent.sum()


def padded():
    """A whole sequence, one with a hole of a segment of four, one that starts late, an empty one."""
    position = jnp.arange(T)
    return jnp.stack(
        [position < T - 3, (position < 4) | (position > 8), position > 5, position < 0]
    )


def told(gate, valid, rows=1, params=None, train=False, **known):
    """Merging weights [B, N, E], and the routing that tells of them."""
    params = gates.drawn(gate) if params is None else params
    given = gates.context(train, rows=rows, valid_BL=valid, **known)
    x = jnp.where(valid[..., None], gates.tokens(), 0).reshape(G // rows, rows * T, D)
    out = gate(params, (), x, given)
    return out.mixing, out.routing


# SMEAR


def test_a_small_case_by_hand():
    """Mean (3, 1), normalised (1, -1); columns (1, -1) and (-1, 1), halved: logits 1 and -1."""
    gate = Smear()
    params = {
        "router_DE": jnp.asarray([[5.0, -7.0], [3.0, -1.0]]) * 100,
        "router_scale_D": jnp.full(2, 0.5),
        "bias_E": jnp.asarray([0.0, 0.25]),
        "norm_scale_D": jnp.ones(2),
        "norm_offset_D": jnp.zeros(2),
    }
    x = jnp.asarray([[[2.0, 2.0], [4.0, 0.0], [9.0, 9.0]]])
    valid = jnp.asarray([[True, True, False]])
    given = moejax.Context.of(1, 3, valid_BL=valid).grouped(1, train=False)
    out = gate(params, (), x, given)
    wanted = softmax(np.asarray([1.0, -0.75]))  # 0.852, 0.148
    # The norm adds 1e-5 to a variance of 1.
    np.testing.assert_allclose(out.mixing.weight_BNE[0, 0], wanted, atol=1e-5)
    np.testing.assert_allclose(out.routing.weight_GTK[0, :2], [wanted, wanted], atol=1e-5)
    assert (out.routing.weight_GTK[0, 2] == 0).all() and out.mixing.span == 3


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sequence_is_merged_by_the_norm_of_its_mean(rows):
    gate, valid = Smear(), padded()
    params = gates.drawn(gate)
    mixing, routing = told(gate, valid, rows)
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    p = jax.tree.map(np.asarray, params)
    for b in range(G):
        taken = np.asarray(gates.tokens()[b][valid[b]])
        mean = taken.mean(0) if len(taken) else np.zeros(D)
        router_ED = norm(p["router_DE"].T) * p["router_scale_D"]
        mean = norm(mean) * p["norm_scale_D"] + p["norm_offset_D"]
        wanted = softmax(router_ED @ mean + p["bias_E"])
        np.testing.assert_allclose(mixing.weight_BNE[b, 0], wanted, rtol=1e-4, atol=1e-5)
        of_tokens = routing.weight_GTK.reshape(G, T, E)[b]
        np.testing.assert_array_equal(of_tokens, valid[b][:, None] * mixing.weight_BNE[b])


def test_dropout_leaves_out_experts_of_a_sequence_and_the_rest_share_alike():
    gate, whole = Smear(expert_dropout=0.5), Smear(expert_dropout=0.0)
    rows, valid = 64, jnp.ones((64, 2), bool)
    params = gates.drawn(gate, scale=0.5)
    x = jax.random.normal(jax.random.key(0), (rows, 2, D))

    def weights(gate, row_B, x, train=True, key=jax.random.key(1)):
        given = moejax.Context.of(len(x), 2, valid_BL=valid[: len(x)], row_B=row_B, key=key)
        return np.asarray(gate(params, (), x, given.grouped(1, train)).mixing.weight_BNE[:, 0])

    dropped, p = weights(gate, jnp.arange(rows), x), weights(whole, jnp.arange(rows), x, key=None)
    kept = dropped > 0
    # 512 fair coins: five standard deviations are 0.11.
    assert abs(kept.mean() - 0.5) < 0.11 and len({tuple(k) for k in kept}) > 50
    close(dropped, p * kept / (p * kept).sum(1, keepdims=True))
    order = np.random.default_rng(0).permutation(rows)[:8]
    np.testing.assert_allclose(weights(gate, order, x[order]), dropped[order], rtol=1e-6)
    close(weights(gate, jnp.arange(rows), x, train=False, key=None), p)
    with pytest.raises(ValueError, match="PRNG key"):
        weights(gate, jnp.arange(rows), x, key=None)


def test_dropout_that_would_take_all_experts_takes_none():
    gate = Smear(expert_dropout=0.999)
    mixing, _ = told(gate, jnp.ones((G, T), bool), train=True)
    plain, _ = told(gate, jnp.ones((G, T), bool))
    close(mixing.weight_BNE, plain.weight_BNE)


# Lory


def merged_by(gate, params, x_TD, valid_T):
    """Each segment's merging weights, in a Python loop over segments."""
    weights, before = [], np.zeros((0, D))
    router_DE = np.asarray(params["router_DE"])
    for start in range(0, T, gate.segment):
        own = x_TD[start : start + gate.segment][valid_T[start : start + gate.segment]]
        if len(before):
            logits = before.mean(0) @ router_DE
        elif gate.first_segment == "learned":
            logits = np.asarray(params["first_E"])
        elif gate.first_segment == "uniform" or not len(own):
            logits = np.zeros(E)
        else:
            logits = (own[0] if gate.first_segment == "bos" else own.mean(0)) @ router_DE
        weights.append(softmax(logits))
        before = own
    return np.stack(weights)


POLICIES = ["learned", "bos", "uniform", "paper"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("segment", "rows"), [(4, 1), (5, 2), (40, 1)])
def test_a_segment_is_merged_by_the_one_before(policy, segment, rows):
    """Segments that divide the length, that do not, and that are longer."""
    gate, valid = Lory(segment, policy), padded()
    params = gates.drawn(gate)
    mixing, routing = told(gate, valid, rows, params)
    assert mixing.weight_BNE.shape == (G, -(-T // segment), E) and mixing.span == segment
    of_tokens = routing.weight_GTK.reshape(G, T, E)
    for b in range(G):
        x_TD, valid_T = np.asarray(gates.tokens()[b]), np.asarray(valid[b])
        wanted = merged_by(gate, params, x_TD, valid_T)
        for t in np.flatnonzero(valid_T):
            np.testing.assert_allclose(of_tokens[b, t], wanted[t // segment], rtol=1e-4, atol=1e-5)
        assert (of_tokens[b][~valid_T] == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_router_learns_from_its_first_segment_with_bos_only(policy):
    """Sequences of one segment: the paper's is told its own mean and learns nothing of it."""
    gate = Lory(T, policy)
    params = gates.drawn(gate)
    reading = jax.random.normal(jax.random.key(1), (E,))

    def pull(params):
        out = gate(params, (), gates.tokens(), gates.context(False))
        return jnp.sum(out.mixing.weight_BNE @ reading)

    grads = jax.grad(pull)(params)
    assert (jnp.abs(grads["router_DE"]).max() > 0) == (policy == "bos")
    assert ("first_E" in grads) == (policy == "learned")
    if policy == "learned":
        assert jnp.abs(grads["first_E"]).max() > 0


# In a layer


def layer(gate, experts=E):
    made = moejax.MoE(D, 12, experts, gate=gate, rngs=nnx.Rngs(0))
    made.router = nnx.data(jax.tree.map(nnx.Param, gates.drawn(gate, experts)))
    return made


def context(train=True, **known):
    return moejax.Context.of(G, T, key=jax.random.key(0), **known)


@pytest.mark.parametrize("gate", [Smear(), Lory(4), Lory(4, "paper")], ids=str)
def test_one_expert_is_an_ffn(gate):
    made = layer(gate, experts=1)
    y, _ = made(gates.tokens(), context())
    one = jax.tree.map(lambda w: w[0], made.expert_weights())
    close(y, ffn_one(one, gates.tokens().reshape(-1, D), "swiglu").reshape(y.shape), atol=1e-5)
    assert not any(gate.visibility(made.config))


def test_one_uniform_segment_is_the_mean_expert():
    made = layer(Lory(T, "uniform"))
    y, _ = made(gates.tokens(), context())
    mean = jax.tree.map(lambda w: w.mean(0), made.expert_weights())
    close(y, ffn_one(mean, gates.tokens().reshape(-1, D), "swiglu").reshape(y.shape), atol=1e-5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_token_moves_earlier_ones_in_the_papers_first_segment_and_nowhere_else(
    policy, train
):
    """Every position in turn is another token; what comes before it must not move."""
    made = layer(Lory(6, policy))
    x, other = gates.tokens(), gates.tokens(5)
    run = jax.jit(lambda x: made(x, context(), train=train)[0])
    y = run(x)
    changed = jax.vmap(lambda t: run(jnp.where(jnp.arange(T)[:, None] == t, other, x)))(
        jnp.arange(T)
    )
    moved_PL = np.abs(changed - y).max((1, 3))  # changed position, position
    earlier = np.tril(np.ones((T, T), bool), -1)
    same_first = np.zeros_like(earlier)
    same_first[:6, :6] = True
    leaks = earlier & same_first & (policy == "paper")
    # The same sums of the same numbers, but for an ulp of a product over other rows.
    assert moved_PL[leaks].min(initial=1) > 1e-3 and moved_PL[earlier & ~leaks].max() < 1e-5
    # The past is seen: the last token of a segment merges the next one.
    assert moved_PL[5, 6:12].min() > 1e-3


@pytest.mark.parametrize("policy", ["learned", "bos"])
def test_the_output_of_a_prefix_is_the_prefix_of_the_output(policy):
    made = layer(Lory(4, policy))
    whole, _ = made(gates.tokens(), context())
    for n in (1, 4, 6):
        part, _ = made(gates.tokens()[:, :n], moejax.Context.of(G, n))
        close(part, whole[:, :n], atol=1e-5)


def test_every_token_of_a_smeared_sequence_sees_every_other_and_no_other_sequence():
    made = layer(Smear())
    run = jax.jit(lambda x: made(x, context(), train=False)[0])
    y, other = run(gates.tokens()), gates.tokens(5)
    last = run(gates.tokens().at[1, -1].set(other[1, -1]))
    assert np.abs(last - y)[1].max(1).min() > 1e-4
    assert np.abs(last - y)[jnp.asarray([0, 2, 3])].max() < 1e-6


@pytest.mark.parametrize("gate", [Smear(), Lory(4, "bos")], ids=str)
def test_padding_may_hold_nan_backwards_too(gate):
    made, valid = layer(gate), padded()
    graph, params = nnx.split(made)

    @jax.jit
    def run(params, x):
        def objective(params):
            y, info = nnx.merge(graph, params)(x, context(valid_BL=valid))
            return jnp.sum(jnp.where(valid[..., None], jnp.sin(y), 0)), (y, info.stats)

        return jax.value_and_grad(objective, has_aux=True)(params)

    x = jnp.where(valid[..., None], gates.tokens(), 0.0)
    wanted, got = run(params, x), run(params, jnp.where(valid[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(wanted))
    (_, (y, stats)), grads = wanted
    assert not np.asarray(y)[~np.asarray(valid)].any()
    assert stats.tokens == valid.sum() and stats.dropped_E.sum() == 0
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


MESHES = [
    pytest.param(shape, gate, id=f"{gate}-{meshes.name(shape)}",
                 marks=() if (shape == meshes.LARGE and gate == "lory") else pytest.mark.slow)
    for shape in meshes.ALL for gate in ("smear", "lory")
]  # fmt: skip


@pytest.mark.parametrize(("shape", "gate"), MESHES)
def test_no_mesh_changes_anything(shape, gate):
    fields = (("segment", 4),) if gate == "lory" else ()
    valid = jnp.arange(moes.L) < jnp.asarray([6, 6, 5, 6, 3, 6, 6, 0])[:, None]
    x, given = moes.tokens(), moes.context(valid_BL=valid)
    got, wanted = (moes.run(s, gate, x, given, gate_fields=fields) for s in (shape, None))
    moes.same(got, wanted)
    assert wanted[0][1][1].stats.load_E.sum() > 0


# Refusals


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Lory(0), "gate.segment=0 must be above 0"),
        (Lory(first_segment="none"), "gate.first_segment='none' is unknown; use one of learned"),
        (Smear(expert_dropout=1.0), "gate.expert_dropout=1.0 must be 0 or above, and below 1"),
        (Smear(init_scale=0.0), "gate.init_scale=0.0 must be above 0"),
    ],
)
def test_fields_out_of_range_are_refused(gate, message):
    with pytest.raises(ValueError, match=message):
        gate.check(E, train=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_sequences_of_one_segment_are_refused_where_the_router_would_learn_nothing(policy):
    gate = gating.make("lory", segment=32, first_segment=policy)
    assert isinstance(gate, Lory)
    gate.check_data(layers=1, length=33, train_rows=8, eval_rows=8)
    gate.check_data(layers=1, length=32, train_rows=0, eval_rows=8)
    if policy == "bos":
        gate.check_data(layers=1, length=32, train_rows=8, eval_rows=8)
        return
    with pytest.raises(ValueError, match=r"gate\.segment=32 .* of 32 tokens.*use gate\.segment=8"):
        gate.check_data(layers=1, length=32, train_rows=8, eval_rows=8)
