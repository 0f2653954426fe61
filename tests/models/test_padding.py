"""Models whose sequences have padding before, between or instead of their tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.gating.lory import FIRST_SEGMENTS
from moejax.gating.sentence import POOLS
from moejax.types import Context
from tests import lms
from tests.claims import Claims
from tests.lms import CLOSE, D, L, V, built, model_of

PAD = 3


def with_gate(name, **fields):
    settings = lms.config(moe={"transport": "dropless"})
    return lms.changed(settings, gate=gating.make(name, **fields))


MODELS = {
    "experts": lms.config(num_kv_heads=2, moe={"transport": "dropless"}),
    "cells": lms.config(moe={"capacity_factor": 4.0}),
    "heads": lms.config(every=0, moa_experts=5),
    "depths": lms.config(every=2, mod_capacity=1.0, moe={"transport": "dropless"}),
    "some_depths": lms.config(every=2, mod_capacity=0.3, moe={"transport": "dropless"}),
    "predicted_depths": lms.config(every=0, mod_capacity=0.3),
    "lory": with_gate("lory", segment=2),
    "sentence": with_gate("sentence", pool="previous", segment=2),
}


@functools.cache
def program(model: str, train: bool):
    settings = MODELS[model]

    def run(params, token_BL, valid_BL, position_BL):
        known = {"token_BL": token_BL, "valid_BL": valid_BL, "position_BL": position_BL}
        given = Context.of(*token_BL.shape, **known)
        lm = model_of(settings, params)
        logits_BLV, aux = lm(token_BL, given, lm.init_gate_state(), train)
        valid_BLV = jnp.where(valid_BL[..., None], logits_BLV, 0)
        return jnp.sum(jnp.sin(valid_BLV)) + sum(aux.losses.values()), (logits_BLV, aux)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def outcome(model, train, token, valid, position):
    """Losses, logits and gradients."""
    return jax.device_get(program(model, train)(built(MODELS[model])[1], token, valid, position))


TOKENS = np.random.default_rng(0).integers(0, V, (2, L)).astype(np.int32)
NO_TOKEN = 10**6
"""An id beyond the vocabulary, which is looked up as NaN."""
CASES = [("experts", True), ("predicted_depths", False)]
SLOW = [("experts", False), ("cells", True), ("heads", True), ("depths", True), ("lory", True)]
SLOW += [("sentence", True), ("some_depths", True)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
TWO_ROWS = np.repeat([True, False], 2)[:, None]


def behind_padding(junk):
    """Two sequences behind padding, and two rows of nothing but padding."""
    valid = np.broadcast_to(TWO_ROWS & (np.arange(L + PAD) >= PAD), (4, L + PAD))
    return padded(valid, junk)


def padded(valid, junk=NO_TOKEN):
    """Tokens, validity, and the positions that a context gives them by default."""
    token = np.full(valid.shape, junk, np.int32)
    token[valid] = TOKENS.ravel()
    return token, valid, np.asarray(Context.of(*valid.shape, valid_BL=valid).position_BL)


def before_padding():
    return padded(np.broadcast_to(TWO_ROWS & (np.arange(L + PAD) < L), (4, L + PAD)))


def between_padding():
    rng = np.random.default_rng(1)
    valid = np.zeros((4, L + PAD), bool)
    for row in valid[:2]:
        row[rng.choice(L + PAD, L, replace=False)] = True
    position = np.maximum(np.cumsum(valid, axis=1, dtype=np.int32) - 1, 0)
    return *padded(valid)[:2], position


PLACES = {
    "behind padding of zeros": lambda: behind_padding(0),
    "behind padding of no token": lambda: behind_padding(NO_TOKEN),
    "before padding": before_padding,
    "with gaps where positions leave them out": between_padding,
}


def same(got, valid, wanted):
    """Equal logits at the tokens, losses, counts and gradients of all parameters; all finite."""
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    (loss, (logits, found)), grads = got
    (wanted_loss, (wanted_logits, wanted_found)), wanted_grads = wanted
    CLOSE(logits[valid].reshape(2, L, V), wanted_logits)
    CLOSE(loss, wanted_loss)
    # Sums over tokens of gradients of size 10, in another order.
    jax.tree.map(functools.partial(CLOSE, rtol=1e-4, atol=1e-4), grads, wanted_grads)
    jax.tree.map(CLOSE, (found.losses, found.means), (wanted_found.losses, wanted_found.means))
    CLOSE(found.mean_square, wanted_found.mean_square)
    if found.stats is not None:
        np.testing.assert_array_equal(found.stats.load_E, wanted_found.stats.load_E)


@pytest.mark.parametrize(("model", "train"), CASES)
def test_a_padded_sequence_gives_the_results_of_the_sequence_without_padding(model, train):
    """Beside rows of nothing but padding, which add nothing."""
    wanted = outcome(model, train, *padded(np.ones((2, L), bool)))
    claims = Claims(f"{model} in {'training' if train else 'evaluation'}")
    for name, place in PLACES.items():
        token, valid, position = place()
        got = outcome(model, train, token, valid, position)
        claims.check(same, got, valid, wanted, name=name)
    claims.settle()


def test_positions_count_from_the_first_valid_token_of_a_sequence_or_segment():
    valid = np.array([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    of = lambda **known: np.asarray(Context.of(3, 6, **known).position_BL).tolist()
    assert of() == [[0, 1, 2, 3, 4, 5]] * 3
    assert of(valid_BL=valid) == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0] * 6]
    segment = np.array([[5, 5, 5, 9, 9, 9], [2, 2, 4, 4, 4, 2], [0] * 6], np.int32)
    assert of(valid_BL=valid, segment_BL=segment)[:2] == [[0, 0, 0, 0, 1, 2], [0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("model", ["experts", "sentence"])
def test_texts_packed_into_one_sequence_give_the_results_of_separate_texts(model):
    token = np.concatenate([TOKENS[:1], TOKENS[1:]], axis=1)
    segment = jnp.repeat(jnp.array([[3, 1]]), L, axis=1)
    lm = model_of(MODELS[model])
    packed = Context.of(1, 2 * L, token_BL=jnp.asarray(token), segment_BL=segment)
    run = jax.jit(lambda t, c: lm(t, c, lm.init_gate_state(), False)[0])
    got = run(jnp.asarray(token), packed).reshape(2, L, V)
    alone = run(jnp.asarray(TOKENS), Context.of(2, L, token_BL=jnp.asarray(TOKENS)))
    CLOSE(got, alone)
    assert lm.config.d_model == D


@pytest.mark.parametrize("gate", ["lory", "smear", "soft"])
def test_packed_texts_are_refused_where_a_gate_would_mix_them(gate):
    layer = moejax.MoE(D, 8, 4, gate=gate, rngs=nnx.Rngs(0))
    segment_L = jnp.repeat(jnp.array([3, 1]), L // 2)
    packed = Context.of(2, L, segment_BL=jnp.stack([segment_L, segment_L]))
    with pytest.raises(
        ValueError, match=f"(?i)gate {gate} mixes .*give each text a row of its own"
    ):
        layer(jnp.zeros((2, L, D)), packed)


SEGMENT = 4
CUTTING = [gating.make("lory", segment=SEGMENT, first_segment=first) for first in FIRST_SEGMENTS]
CUTTING += [gating.make("sentence", segment=SEGMENT, pool=pool) for pool in POOLS]
CUTTING += [gating.make("smear"), gating.make("hash", table="bigram"), gating.make("shazeer")]


def cutting():
    """Quick: one of each kind in training, and one that looks at other tokens in evaluation."""
    names = [type(gate).__name__ for gate in CUTTING]
    for i, gate in enumerate(CUTTING):
        for train in (True, False):
            quick = i == names.index(names[i]) and (train or names[i] == "Sentence")
            phase = "train" if train else "eval"
            yield pytest.param(
                gate, train, id=f"{gate}-{phase}", marks=() if quick else pytest.mark.slow
            )


@pytest.mark.parametrize(("gate", "train"), list(cutting()))
def test_the_outputs_of_a_layer_do_not_depend_on_leading_padding(gate, train):
    """One sequence behind 0, 1, ... places of padding that hold NaN: each a row of one batch."""
    pads, length = SEGMENT + 4, 2 * SEGMENT + 2
    layer = moejax.MoE(D, 8, 4, gate=gate, transport="dropless", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x_LD = np.random.default_rng(2).normal(size=(length, D)).astype(np.float32)
    token_L = np.arange(length, dtype=np.int32) % 3

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x_BLD, token_BL, valid_BL):
        key, row_B = jax.random.key(1), jnp.zeros(len(x_BLD), jnp.int32)
        known = {"token_BL": token_BL, "valid_BL": valid_BL, "row_B": row_B, "key": key}
        given = Context.of(*valid_BL.shape, **known)
        y_BLD, info = nnx.merge(graph, params)(x_BLD, given, train=train)
        y_BLD = jnp.where(valid_BL[..., None], y_BLD, 0)
        objective = jnp.sum(jnp.sin(y_BLD)) / len(x_BLD) + sum(info.losses.values())
        return objective, (y_BLD, info.losses, info.stats.load_E / len(x_BLD))

    x_BLD = np.full((pads, length + pads - 1, D), np.nan, np.float32)
    token_BL, valid_BL = np.full(x_BLD.shape[:2], 77, np.int32), np.zeros(x_BLD.shape[:2], bool)
    for pad in range(pads):
        own = slice(pad, pad + length)
        x_BLD[pad, own], token_BL[pad, own], valid_BL[pad, own] = x_LD, token_L, True
    (got, (y, losses, load)), (by_params, by_x) = run(params, x_BLD, token_BL, valid_BL)
    whole = x_LD[None], token_L[None], np.ones((1, length), bool)
    (wanted, (y_, losses_, load_)), (by_params_, by_x_) = run(params, *whole)
    jax.tree.map(CLOSE, (got, losses, load), (wanted, losses_, load_))
    jax.tree.map(CLOSE, by_params, by_params_)
    CLOSE(y[valid_BL].reshape(pads, length, D), np.repeat(y_, pads, axis=0))
    CLOSE(by_x[valid_BL].reshape(pads, length, D), np.repeat(by_x_ / pads, pads, axis=0))
    assert np.abs(y_).max() > 1e-3 and not np.any(by_x[~valid_BL])
