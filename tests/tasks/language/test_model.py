"""The language model: what a token depends on, and depth as a scan over ordinary blocks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.models.stack import REMAT
from moejax.tasks.language.model import LM, LMConfig
from moejax.tasks.task import to_tree
from tests.lms import (
    CLOSE,
    KEY,
    MIXED,
    B,
    E,
    L,
    apply,
    built,
    config,
    context,
    label,
    model_of,
    objective,
    run,
    slow_unless,
    tokens,
)

# What a token sees.

CAUSAL = [
    config("switch"),
    config("mixtral"),
    config("shazeer"),
    config("gshard"),
    config("switch", moe={"priority": "choice"}),
    config("mixtral", moe={"transport": "dropless"}),
    config("mixtral", moe={"transport": "gather"}),
    config("dense", moe={"transport": "all_experts", "eval_transport": "all_experts"}),
    config(every=0),
    MIXED,
]
QUICK = [CAUSAL[0], CAUSAL[1], CAUSAL[5], CAUSAL[7], MIXED]


def earlier_change(settings: LMConfig, train: bool) -> float:
    """Largest change of a logit before the last half of the tokens, when that half is changed."""
    token_BL = tokens()
    changed = token_BL.at[:, L // 2 :].set(tokens(2)[:, L // 2 :])
    assert (changed != token_BL).any()
    first, second = (run(settings, t, train)[0] for t in (token_BL, changed))
    difference = np.abs(np.asarray(first - second)).max(axis=(0, 2))
    assert difference[L // 2 :].min() > 1e-3, "tokens must see themselves"
    return float(difference[: L // 2].max())


def check_causal(settings, train):
    # Rows of a sorted matmul move when other rows come or go; their sums may be blocked otherwise.
    assert earlier_change(settings, train) <= 1e-6
    stats = run(settings, tokens(), train)[1].stats
    if stats is not None and train and settings.moe.transport.slot_rules:
        assert stats.dropped_E.sum() > 0, "capacity must bind for this to prove anything"


@pytest.mark.quick(1)
@pytest.mark.parametrize("settings", [slow_unless(s in QUICK, s) for s in CAUSAL], ids=label)
def test_logits_do_not_depend_on_later_tokens_in_training(settings):
    check_causal(settings, train=True)


@pytest.mark.parametrize("settings", [slow_unless(s is MIXED, s) for s in CAUSAL], ids=label)
def test_logits_do_not_depend_on_later_tokens_in_evaluation(settings):
    check_causal(settings, train=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "priority", [slow_unless(p == "choice", p) for p in ("choice", "gate", "random")]
)
def test_priorities_that_admit_later_tokens_leak_in_training_only(priority):
    settings = config("mixtral", moe={"priority": priority})
    assert earlier_change(settings, train=True) > 1e-3
    assert earlier_change(settings, train=False) <= 1e-6


def test_sequences_do_not_affect_each_other():
    token_BL = tokens()
    changed = token_BL.at[1:].set(tokens(2)[1:])
    first, second = (run(MIXED, t)[0] for t in (token_BL, changed))
    np.testing.assert_array_equal(first[0], second[0])


# Depth.


def unrolled(model: LM, token_BL, train):
    """The same blocks in a Python loop, written from the formula."""
    settings, ctx, key = model.config, context(token_BL), jax.random.key(KEY)
    x_BLD = model.embed_VD[...][token_BL] * math.sqrt(settings.d_model)
    squares, experts = [], []
    for block in model.first:
        x_BLD, *_ = block(x_BLD, ctx, (), train, None)
        squares.append(jnp.mean(x_BLD**2))
    graph, stacked = nnx.split(model.periods)
    for index in range(settings.num_periods):
        period = nnx.merge(graph, jax.tree.map(lambda p, i=index: p[i], stacked))
        own = dataclasses.replace(ctx, key=jax.random.fold_in(key, index))
        for block in period.blocks:
            x_BLD, aux = block(x_BLD, own, (), train, None)
            squares.append(jnp.mean(x_BLD**2))
            experts += [] if aux.stats is None else [aux]
    x_BLD = x_BLD / jnp.sqrt(jnp.mean(x_BLD**2, -1, keepdims=True) + settings.norm_eps)
    head = model.embed_VD[...].T if model.text.tie_embeddings else model.head_DV[...]
    return (x_BLD * model.final_norm.scale_D[...]) @ head, jnp.stack(squares), experts


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "settings",
    [MIXED, config(every=0), slow_unless(False, config(tie_embeddings=False))],
    ids=label,
)
def test_the_scan_over_periods_equals_a_loop(settings):
    logits, squares, experts = jax.jit(
        lambda params, t: unrolled(model_of(settings, params), t, True)
    )(built(settings)[1], tokens())
    logits_BLV, aux = run(settings, tokens())
    CLOSE(logits_BLV, logits)
    CLOSE(aux.mean_square, squares)
    assert aux.mean_square.shape == (settings.num_layers,)
    assert len(experts) == settings.num_moe_layers
    for name in aux.losses:
        CLOSE(aux.losses[name], np.mean([own.losses[name] for own in experts]))
    if experts:
        assert aux.stats is not None and aux.stats.load_E.shape == (len(experts), E)
        for layer, own in enumerate(experts):
            jax.tree.map(CLOSE, jax.tree.map(lambda x, i=layer: x[i], aux.stats), own.stats)
        loads = np.asarray(aux.stats.load_E)
        assert len(experts) < 2 or (loads[0] != loads[1]).any(), "layers draw and learn their own"


def test_a_dense_model_has_no_router_losses_and_no_gate_state():
    (_, aux), model = run(config(every=0), tokens()), model_of(config(every=0))
    assert aux.losses == {} and aux.stats is None and model.init_gate_state() == ()
    assert model.update_gate_state((), None) == ()


NOISY = config("shazeer", shared_experts=1, num_kv_heads=2)


@functools.cache
def graded(settings: LMConfig):
    def step(params, token_BL):
        out = apply(model_of(settings, params), token_BL, True)
        return objective(out, token_BL), out[1].stats

    value, grads = jax.jit(jax.value_and_grad(step, has_aux=True))(built(settings)[1], tokens())
    return value, to_tree(grads)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [r for r in REMAT if r != "none"])
def test_recomputation_changes_neither_loss_nor_gradients_nor_counts(remat):
    (loss, stats), grads = graded(dataclasses.replace(NOISY, remat=remat))
    (wanted, wanted_stats), wanted_grads = graded(NOISY)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    close(loss, wanted)
    jax.tree.map(close, grads, wanted_grads)
    for field in ("tokens", "load_E", "dropped_E", "dropped_L", "unserved_tokens"):
        np.testing.assert_array_equal(getattr(stats, field), getattr(wanted_stats, field))
    np.testing.assert_array_equal(stats.load_E.sum(-1), [2 * B * L] * 2)
    assert stats.dropped_E.sum() > 0


def test_every_parameter_has_a_gradient():
    _, grads = graded(NOISY)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, path
