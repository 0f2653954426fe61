"""SMEAR and Lory: the weights that merge the experts of a sequence or segment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import gating
from moejax.gating import Lory, Smear
from moejax.types import GateOutput, GateTraits, Merge
from tests import gates
from tests.gates import D, E, G, T

# float32 means, norms, logits and exponentials.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def softmax(logits_E):
    exponent = np.exp(logits_E - logits_E.max())
    return exponent / exponent.sum()


def padded():
    """A sequence cut short, one with a hole, one that starts late, an empty one."""
    position = jnp.arange(T)
    hole = (position < 4) | (position > 8)
    return jnp.stack([position < T - 3, hole, position > 5, position < 0])


@functools.cache
def program(gate):
    return jax.jit(lambda params, x, given: gate(params, (), x, given))


def merging(out: GateOutput) -> Merge:
    assert isinstance(out.mixing, Merge)
    return out.mixing


def routed(gate, valid, rows=1, params=None, train=False, **known):
    """Merging weights [B, N, E] and the routing."""
    params = gates.drawn(gate) if params is None else params
    given = gates.context(train, rows=rows, valid_BL=valid, **known)
    x = jnp.where(valid[..., None], gates.tokens(), 0).reshape(G // rows, rows * T, D)
    out = program(gate)(params, x, given)
    return merging(out), out.routing


# SMEAR


def test_a_small_case_equals_its_result_by_hand():
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
    out = program(gate)(params, x, given)
    wanted = softmax(np.asarray([1.0, -0.75]))  # 0.852, 0.148
    # The norm adds 1e-5 to a variance of 1.
    np.testing.assert_allclose(merging(out).weight_BNE[0, 0], wanted, atol=1e-5)
    np.testing.assert_allclose(out.routing.weight_GTK[0, :2], [wanted, wanted], atol=1e-5)
    assert (out.routing.weight_GTK[0, 2] == 0).all() and merging(out).span == 3


@pytest.mark.quick(1)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_sequence_is_merged_by_its_normalised_mean(rows):
    gate, valid = Smear(), padded()
    params = gates.drawn(gate)
    mixing, routing = routed(gate, valid, rows)
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


def test_dropout_removes_experts_per_sequence_and_keeps_the_proportions_of_the_rest():
    gate, whole = Smear(expert_dropout=0.5), Smear(expert_dropout=0.0)
    rows, valid = 64, jnp.ones((64, 2), bool)
    params = gates.drawn(gate, scale=0.5)
    x = jax.random.normal(jax.random.key(0), (rows, 2, D))

    def weights(gate, row_B, x, train=True, keyed=True):
        key = jax.random.key(1) if keyed else None
        given = moejax.Context.of(len(x), 2, valid_BL=valid[: len(x)], row_B=row_B, key=key)
        out = program(gate)(params, x, given.grouped(1, train))
        return np.asarray(merging(out).weight_BNE[:, 0])

    dropped, p = (
        weights(gate, jnp.arange(rows), x),
        weights(whole, jnp.arange(rows), x, keyed=False),
    )
    kept = dropped > 0
    # 512 fair coins: five standard deviations are 0.11.
    assert abs(kept.mean() - 0.5) < 0.11 and len({tuple(k) for k in kept}) > 50
    fewer = weights(Smear(expert_dropout=0.25), jnp.arange(rows), x) > 0
    # Coins of 3/4: five standard deviations are 0.1.
    assert abs(fewer.mean() - 0.75) < 0.1 and (fewer | ~kept).all(), "of the same draws"
    close(dropped, p * kept / (p * kept).sum(1, keepdims=True))
    order = np.random.default_rng(0).permutation(rows)[:8]
    np.testing.assert_allclose(weights(gate, order, x[order]), dropped[order], rtol=1e-6)
    close(weights(gate, jnp.arange(rows), x, train=False, keyed=False), p)
    with pytest.raises(ValueError, match="PRNG key"):
        weights(gate, jnp.arange(rows), x, keyed=False)


def test_dropout_that_would_remove_all_experts_removes_none():
    gate = Smear(expert_dropout=0.999)
    mixing, _ = routed(gate, jnp.ones((G, T), bool), train=True)
    plain, _ = routed(gate, jnp.ones((G, T), bool))
    close(mixing.weight_BNE, plain.weight_BNE)


# Lory


def merged_by(gate, params, x_ND):
    """Each segment's merging weights, in a Python loop over segments of valid tokens."""
    weights, before = [], np.zeros((0, D))
    router_DE = np.asarray(params["router_DE"])
    for start in range(0, len(x_ND), gate.segment):
        own = x_ND[start : start + gate.segment]
        if len(before):
            logits = before.mean(0) @ router_DE
        elif gate.first_segment == "learned":
            logits = np.asarray(params["first_E"])
        elif gate.first_segment == "uniform":
            logits = np.zeros(E)
        else:
            logits = (own[0] if gate.first_segment == "bos" else own.mean(0)) @ router_DE
        weights.append(softmax(logits))
        before = own
    return weights


POLICIES = ["learned", "bos", "uniform", "paper"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("segment", "rows"), [(4, 1), (5, 2), (40, 1)])
def test_a_segment_is_merged_by_the_weights_of_the_one_before_it(policy, segment, rows):
    """Segments that divide the length, that do not, and that are longer."""
    gate, valid = Lory(segment, policy), padded()
    params = gates.drawn(gate)
    mixing, routing = routed(gate, valid, rows, params)
    assert mixing.weight_BNE.shape == (G, -(-T // segment), E) and mixing.span == segment
    of_tokens = routing.weight_GTK.reshape(G, T, E)
    for b in range(G):
        valid_T = np.asarray(valid[b])
        wanted = merged_by(gate, params, np.asarray(gates.tokens()[b])[valid_T])
        for i, t in enumerate(np.flatnonzero(valid_T)):
            np.testing.assert_allclose(of_tokens[b, t], wanted[i // segment], rtol=1e-4, atol=1e-5)
        assert (of_tokens[b][~valid_T] == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_router_learns_from_its_first_segment_with_bos_only(policy):
    """Sequences of one segment: the paper's sees its own mean and learns nothing from it."""
    gate = Lory(T, policy)
    params = gates.drawn(gate)
    reading = jax.random.normal(jax.random.key(1), (E,))

    def pull(params):
        out = program(gate)(params, gates.tokens(), gates.context(False))
        return jnp.sum(merging(out).weight_BNE @ reading)

    grads = jax.jit(jax.grad(pull))(params)
    assert (jnp.abs(grads["router_DE"]).max() > 0) == (policy == "bos")
    assert ("first_E" in grads) == (policy == "learned")
    if policy == "learned":
        assert jnp.abs(grads["first_E"]).max() > 0


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
    check_data = GateTraits.of(gate).check_data
    assert check_data is not None
    layers, enough, one_segment = 1, 33, 32
    check_data(layers, enough, 8, 8)
    check_data(layers, one_segment, 0, 8)
    if policy == "bos":
        check_data(layers, one_segment, 8, 8)
        return
    with pytest.raises(ValueError, match=r"gate\.segment=32 .* of 32 tokens.*use gate\.segment=8"):
        check_data(layers, one_segment, 8, 8)
