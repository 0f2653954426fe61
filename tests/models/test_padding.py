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
        known = {} if position_BL is None else {"position_BL": position_BL}
        given = Context.of(*token_BL.shape, token_BL=token_BL, valid_BL=valid_BL, **known)
        lm = model_of(settings, params)
        logits_BLV, aux = lm(token_BL, given, lm.init_gate_state(), train)
        valid_BLV = jnp.where(valid_BL[..., None], logits_BLV, 0)
        return jnp.sum(jnp.sin(valid_BLV)) + sum(aux.losses.values()), (logits_BLV, aux)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def outcome(model, train, token, valid, position=None):
    position = None if position is None else jnp.asarray(position, jnp.int32)
    given = (jnp.asarray(token), jnp.asarray(valid), position)
    return jax.device_get(program(model, train)(built(MODELS[model])[1], *given))


TOKENS = np.random.default_rng(0).integers(0, V, (2, L)).astype(np.int32)
ALL = np.ones((2, L), bool)
CASES = [("experts", True), ("experts", False), ("cells", True), ("heads", True), ("depths", True)]
CASES += [("some_depths", True), ("predicted_depths", False), ("lory", True), ("sentence", True)]


def same(first, at_first, second, at_second):
    """Equal logits at the tokens, losses, counts and gradients of all parameters."""
    (loss, (logits, found)), grads = first
    (wanted_loss, (wanted, wanted_found)), wanted_grads = second
    CLOSE(logits[at_first], wanted[at_second])
    CLOSE(loss, wanted_loss)
    # Sums over tokens of gradients of size 10, in another order.
    jax.tree.map(functools.partial(CLOSE, rtol=1e-4, atol=1e-4), grads, wanted_grads)
    jax.tree.map(CLOSE, (found.losses, found.means), (wanted_found.losses, wanted_found.means))
    CLOSE(found.mean_square, wanted_found.mean_square)
    if found.stats is not None:
        np.testing.assert_array_equal(found.stats.load_E, wanted_found.stats.load_E)


@pytest.mark.parametrize(("model", "train"), CASES)
@pytest.mark.parametrize("junk", [0, 10**6], ids=["zeros", "no_token"])
def test_a_sequence_padded_on_the_left_is_the_same_sequence(model, train, junk):
    """Whatever the padding says: an id beyond the vocabulary is looked up as NaN."""
    pad = ((0, 0), (PAD, 0))
    padded = np.pad(TOKENS, pad, constant_values=junk), np.pad(ALL, pad)
    got, wanted = outcome(model, train, *padded), outcome(model, train, TOKENS, ALL)
    same(got, (slice(None), slice(PAD, None)), wanted, (slice(None),) * 2)


@pytest.mark.parametrize(("model", "train"), CASES)
def test_gaps_between_tokens_are_not_there_where_positions_say_so(model, train):
    rng = np.random.default_rng(1)
    valid = np.zeros((2, L + PAD), bool)
    for row in valid:
        row[rng.choice(L + PAD, L, replace=False)] = True
    token = np.full(valid.shape, 10**6, np.int32)
    token[valid] = TOKENS.ravel()
    position = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    got = outcome(model, train, token, valid, position)
    logits = got[0][1][0][valid].reshape(2, L, V)
    wanted = outcome(model, train, TOKENS, ALL)
    whole = (slice(None),) * 2
    same(((got[0][0], (logits, got[0][1][1])), got[1]), whole, wanted, whole)


@pytest.mark.parametrize(("model", "train"), CASES)
def test_a_row_of_nothing_but_padding_adds_nothing_and_leaves_everything_finite(model, train):
    token = np.concatenate([TOKENS, np.full((2, L), 10**6, np.int32)])
    valid = np.concatenate([ALL, np.zeros((2, L), bool)])
    got, wanted = outcome(model, train, token, valid), outcome(model, train, TOKENS, ALL)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    same(got, slice(2), wanted, slice(2))


def test_positions_count_from_the_first_valid_token_of_a_sequence_or_segment():
    valid = np.array([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    of = lambda **known: np.asarray(Context.of(3, 6, **known).position_BL).tolist()
    assert of() == [[0, 1, 2, 3, 4, 5]] * 3
    assert of(valid_BL=valid) == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0] * 6]
    segment = np.array([[5, 5, 5, 9, 9, 9], [2, 2, 4, 4, 4, 2], [0] * 6], np.int32)
    assert of(valid_BL=valid, segment_BL=segment)[:2] == [[0, 0, 0, 0, 1, 2], [0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("model", ["experts", "sentence"])
def test_texts_packed_into_one_sequence_are_those_texts_alone(model):
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
def test_texts_packed_into_one_row_are_refused_where_a_gate_would_mix_them(gate):
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


@pytest.mark.parametrize("gate", CUTTING, ids=str)
def test_a_layer_gives_tokens_the_same_behind_any_padding(gate):
    """One sequence behind 0, 1, ... places of padding that hold NaN: each a row of one batch."""
    pads, length = SEGMENT + 4, 2 * SEGMENT + 2
    layer = moejax.MoE(D, 8, 4, gate=gate, transport="dropless", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x_LD = np.random.default_rng(2).normal(size=(length, D)).astype(np.float32)
    token_L = np.arange(length, dtype=np.int32) % 3

    @functools.partial(jax.jit, static_argnames="train")
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x_BLD, token_BL, valid_BL, train):
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
    for train in (True, False):
        (got, (y, losses, load)), (by_params, by_x) = run(params, x_BLD, token_BL, valid_BL, train)
        whole = x_LD[None], token_L[None], np.ones((1, length), bool)
        (wanted, (y_, losses_, load_)), (by_params_, by_x_) = run(params, *whole, train)
        jax.tree.map(CLOSE, (got, losses, load), (wanted, losses_, load_))
        jax.tree.map(CLOSE, by_params, by_params_)
        CLOSE(y[valid_BL].reshape(pads, length, D), np.repeat(y_, pads, axis=0))
        CLOSE(by_x[valid_BL].reshape(pads, length, D), np.repeat(by_x_ / pads, pads, axis=0))
        assert np.abs(y_).max() > 1e-3 and not np.any(by_x[~valid_BL])
