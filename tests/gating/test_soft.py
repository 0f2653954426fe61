"""Soft MoE's gate: loops in numpy, the numbers of V-MoE's own tests, padding, derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st

from moejax import gating
from moejax.gating.soft import Soft, mean_cosine, softmax_over_tokens
from moejax.options import DispatchOptions
from moejax.types import Context, Slots, Visibility
from tests import gates
from tests.gates import D, E, G, T

CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
"""float32: products of length 16, sums of at most 24 exponentials."""


def by_hand(params, x_GTD, valid_GT, slots, normalize):
    """Dispatch and combine weights of valid tokens, token by token and slot by slot, float64."""
    x_GTD, mu_DX = np.asarray(x_GTD, np.float64), np.asarray(params["router_DX"], np.float64)
    scale = float(params.get("scale", 1.0))
    shape = (*x_GTD.shape[:2], mu_DX.shape[1])
    dispatch, combine = np.zeros(shape), np.zeros(shape)
    assert mu_DX.shape[1] == E * slots
    for g in range(shape[0]):
        valid = [t for t in range(shape[1]) if valid_GT[g, t]]
        exps = np.zeros(shape[1:])
        for t in valid:
            for i in range(shape[2]):
                x, mu = x_GTD[g, t], mu_DX[:, i]
                if normalize:
                    x, mu = (v / np.sqrt((v**2).sum() + 1e-6) for v in (x, mu))
                exps[t, i] = np.exp(scale * (x * mu).sum())
        for t in valid:
            combine[g, t] = exps[t] / exps[t].sum()
            for i in range(shape[2]):
                dispatch[g, t, i] = exps[t, i] / sum(exps[u, i] for u in valid)
    return dispatch, combine


VALID = np.arange(T) < np.asarray([T, 9, 1, 0])[:, None]


@functools.cache
def program(gate):
    return jax.jit(gate.__call__)


def call(gate, x_GTD=None, valid=None, params=None, train=True) -> tuple:
    """The gate's output and its mixing."""
    x_GTD = gates.tokens() if x_GTD is None else x_GTD
    valid = np.ones(x_GTD.shape[:2], bool) if valid is None else valid
    given = Context.of(*valid.shape, valid_BL=jnp.asarray(valid), key=jax.random.key(3))
    params = gates.drawn(gate) if params is None else params
    out = program(gate)(params, (), x_GTD, given.grouped(1, train))
    assert isinstance(out.mixing, Slots)
    return out, out.mixing


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_weights_equal_the_two_softmaxes_written_out(slots, normalize):
    gate = Soft(slots=slots, normalize=normalize)
    out, mixing = call(gate, valid=VALID)
    wanted = by_hand(gates.drawn(gate), gates.tokens(), VALID, slots, normalize)
    CLOSE(mixing.dispatch_GTX, wanted[0])
    CLOSE(mixing.combine_GTX, wanted[1])
    CLOSE(mixing.dispatch_GTX.sum(1), np.broadcast_to(VALID.any(1, keepdims=True), (G, E * slots)))
    CLOSE(mixing.combine_GTX.sum(-1), VALID)
    # The routing reports every expert, with the share of its slots.
    np.testing.assert_array_equal(out.routing.expert_GTK[1, 2], np.arange(E))
    CLOSE(out.routing.weight_GTK, wanted[1].reshape(G, T, E, slots).sum(-1))
    CLOSE(out.stats.probs_GTE[VALID], out.routing.weight_GTK[VALID])


def test_the_log_sum_exp_of_the_reported_logits_equals_that_of_all_slots():
    gate = Soft(slots=3, normalize=False)
    out, _ = call(gate)
    logits = np.asarray(gates.tokens()) @ np.asarray(gates.drawn(gate)["router_DX"])
    wanted = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    CLOSE(jax.nn.logsumexp(out.stats.logits_GTE, axis=-1), wanted)


def test_parameters_have_a_column_per_slot_and_start_as_in_the_authors_code():
    """V-MoE's router_test.py: mu of shape (16, 5, 2) and a scale, for 16 wide and 5 experts."""
    params = Soft(slots=2).init(jax.random.key(0), gates.spec(5))
    assert {name: p.shape for name, p in params.items()} == {"router_DX": (16, 10), "scale": ()}
    assert params["scale"] == 1 and {p.dtype for p in params.values()} == {jnp.dtype("float32")}
    wide = Soft(slots=16).init(jax.random.key(0), gates.spec(64))["router_DX"]
    # LeCun's normal over (D, E, P) has fan-in D E; 16384 draws: 3 standard errors are 1.7 %.
    np.testing.assert_allclose(wide.std() * np.sqrt(D * 64), 1.0, rtol=0.017)
    assert set(Soft(normalize=False).init(jax.random.key(0), gates.spec(5))) == {"router_DX"}


def test_mean_cosines_equal_the_published_ones_and_scipys():
    """The metrics of V-MoE's router_test.py (test_metrics), numbers from there."""
    weights = np.zeros((1, 4, 3, 2), np.float32)  # tokens, experts, slots
    for t, e, p in [(0, 0, 0), (0, 1, 1), (1, 1, 0), (2, 0, 1), (2, 2, 0), (3, 2, 1)]:
        weights[0, t, e, p] = 1
    rows = weights.reshape(1, 4, 6)
    CLOSE(mean_cosine(jnp.asarray(rows)), 0.0)
    CLOSE(mean_cosine(jnp.asarray(rows.swapaxes(1, 2))), 4 / 30)
    mu = np.asarray([[1, 0, 2, 1, -1, 0], [0, 1, 0, 1, 0, -1]], np.float32)
    CLOSE(mean_cosine(jnp.asarray(mu.T[None])), (1 / np.sqrt(2) - 2) / 15)

    x = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    pairs = [1 - scipy.spatial.distance.pdist(v, "cosine") for v in x]
    CLOSE(mean_cosine(jnp.asarray(x)), np.mean(pairs, axis=1))
    some = jnp.arange(7) < jnp.asarray([[4], [1], [0]])
    CLOSE(
        mean_cosine(jnp.asarray(x), some),
        [1 - scipy.spatial.distance.pdist(x[0, :4], "cosine").mean(), 0, 0],
    )


def test_the_reported_similarities_are_mean_cosines_over_valid_tokens_and_slots():
    out, mixing = call(Soft(), valid=VALID)
    dispatch, combine = (np.asarray(a)[1, :9] for a in (mixing.dispatch_GTX, mixing.combine_GTX))
    mu = np.asarray(gates.drawn(Soft())["router_DX"])
    for name, rows in (("combine", combine), ("dispatch", dispatch.T), ("router", mu.T)):
        wanted = 1 - scipy.spatial.distance.pdist(rows, "cosine").mean()
        CLOSE(out.means[f"{name}_similarity"][1], wanted)
    same = jnp.broadcast_to(gates.tokens()[:, :1], (G, T, D))
    equal, _ = call(Soft(), same)
    CLOSE(equal.means["combine_similarity"], 1.0)
    CLOSE(equal.means["dispatch_similarity"], 1.0)


@settings(max_examples=30, deadline=None)
@draws(st.permutations(range(T)), st.integers(0, T), st.integers(0, 2**31 - 1))
def test_permuting_tokens_permutes_the_weights(order, count, seed):
    order = np.asarray(order)
    x = gates.tokens(seed, 2)
    valid = np.broadcast_to(np.arange(T) < count, (2, T))
    here, there = (call(Soft(slots=2), x[:, at], valid[:, at])[1] for at in (np.arange(T), order))
    jax.tree.map(lambda a, b: CLOSE(a[:, order], b), here, there)


def test_padding_changes_nothing_and_equals_a_group_without_it():
    gate = Soft(slots=2)
    x = jnp.where(VALID[..., None], gates.tokens(), 0)
    _, padded = call(gate, x, VALID)
    for g, count in ((1, 9), (2, 1)):
        _, short = call(gate, x[g : g + 1, :count])
        CLOSE(padded.dispatch_GTX[g, :count], short.dispatch_GTX[0])
        CLOSE(padded.combine_GTX[g, :count], short.combine_GTX[0])
    assert not padded.dispatch_GTX[~VALID].any() and not padded.combine_GTX[~VALID].any()


def test_a_group_without_tokens_has_zeros_and_zero_gradients():
    logits = jax.random.normal(jax.random.key(0), (G, T, 5))
    read = jax.random.normal(jax.random.key(1), (G, T, 5))

    def total(logits):
        return jnp.sum(read * softmax_over_tokens(logits, jnp.asarray(VALID)))

    value, grad = jax.value_and_grad(total)(logits)
    assert jnp.isfinite(value) and jnp.isfinite(grad).all()
    assert not grad[3].any() and not grad[~VALID].any() and (grad[1, :9] != 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_equal_finite_differences(normalize):
    """A random function of both weights, in every parameter and some tokens, in float64."""
    gate = Soft(slots=2, normalize=normalize)
    params, x = gates.drawn(gate), gates.tokens()
    read = np.random.default_rng(0).normal(size=(2, G, T, 2 * E))

    def ours(params, x):
        _, mixing = call(gate, x, VALID, params)
        both = jnp.stack([mixing.dispatch_GTX, mixing.combine_GTX])
        return jnp.sum(read.astype(np.float32) * both)

    def theirs(params, x):
        return float(np.sum(read * np.stack(by_hand(params, x, VALID, 2, normalize))))

    grads = jax.jit(jax.grad(ours, (0, 1)))(params, x)
    at = np.random.default_rng(1)
    step = 1e-4  # truncation of order 1e-8, rounding of order 1e-12
    for name, place in [
        *(("router_DX", (at.integers(D), at.integers(2 * E))) for _ in range(6)),
        *((("scale", ()),) if normalize else ()),
        *(("x", (g, at.integers(n), at.integers(D))) for g, n in ((0, T), (1, 9), (2, 1))),
        ("x", (3, 0, 0)),
    ]:
        values = []
        for sign in (1, -1):
            moved = {k: np.array(v, np.float64) for k, v in {**params, "x": x}.items()}
            moved[name][place] += sign * step
            values.append(theirs(moved, moved["x"]))
        found = grads[1] if name == "x" else grads[0][name]
        # float32 sums of about a thousand terms of size 1/16 and less.
        np.testing.assert_allclose(
            found[place], (values[0] - values[1]) / (2 * step), rtol=1e-3, atol=2e-5
        )


def test_noise_depends_on_the_row_and_is_added_in_training_only():
    gate = Soft(noise_std=0.5)
    params = gates.drawn(gate)
    plain = program(Soft())(params, (), gates.tokens(), gates.context(True, keyed=False))
    noisy = program(gate)(params, (), gates.tokens(), gates.context(True))
    quiet = program(gate)(params, (), gates.tokens(), gates.context(False, keyed=False))
    jax.tree.map(np.testing.assert_array_equal, quiet, plain)
    np.testing.assert_array_equal(noisy.stats.logits_GTE, plain.stats.logits_GTE)
    shift = np.log(noisy.mixing.combine_GTX) - np.log(plain.mixing.combine_GTX)
    shift -= shift.mean(-1, keepdims=True)
    # 512 draws less a mean of 8: 3 standard errors are 10 %.
    np.testing.assert_allclose(shift.std(), 0.5 * np.sqrt(7 / 8), rtol=0.1)
    # Both softmaxes are of the same noisy logits: but for a constant per slot and per token.
    both = (np.log(noisy.mixing.dispatch_GTX) - np.log(plain.mixing.dispatch_GTX), shift)
    one, other = (x - x.mean(1, keepdims=True) for x in both)
    CLOSE(one - one.mean(-1, keepdims=True), other)
    given = gates.context(True)
    moved = dataclasses.replace(given, row_GR=given.row_GR[::-1])
    other = program(gate)(params, (), gates.tokens()[::-1], moved)
    CLOSE(other.mixing.combine_GTX[::-1], noisy.mixing.combine_GTX)


def test_a_token_depends_on_its_group_even_with_one_slot():
    for experts in (1, E):
        assert Soft().visibility(DispatchOptions(num_experts=experts).config) == Visibility(
            True, False, True, False
        )
        two = DispatchOptions(num_experts=experts, group="2").config
        assert Soft().visibility(two) == Visibility(*[True] * 4)
    assert Soft(slots=3).capacity(100, E, 9.0) == 3, "whatever the capacity factor"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"slots": 0}, "gate.slots=0 must be"), ({"noise_std": -1.0}, "gate.noise_std=-1.0")],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gating.make("soft", **fields).check(E, train=True)
