"""Models with routed blocks, chosen attention heads and residual experts, as a whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.models.stack import REMAT
from moejax.tasks.task import to_tree
from moejax.types import Context
from tests import lms, meshes
from tests.lms import L, V, built, model_of, slow_unless

DEPTHS = lms.config(every=0, mod_capacity=0.3)
SPARSE = lms.config(every=2, mod_capacity=0.3)
BY_ROUTER = lms.changed(DEPTHS, mod_predictor="router")
HEADS = lms.config(every=0, moa_experts=5)
EVERYTHING = lms.config(
    "residual_moe",
    every=2,
    shared_experts=1,
    residual=True,
    mod_capacity=0.5,
    moa_experts=5,
)
"""Dense, then routed with experts; both with chosen heads."""
ROWS = 8
TRACED = []
"""The meshes that the program below was traced on."""
LENGTHS = np.array([L, L, 5, L, 1, L, L, 6])


def label(settings):
    if settings.heads.experts:
        return "heads"
    return f"depths-{settings.depths.predictor}{'-experts' if settings.every else ''}"


def tokens(seed=1):
    return jax.random.randint(jax.random.key(seed), (ROWS, L), 0, V)


def call(settings, params, token_BL, valid_BL, train):
    model = model_of(settings, params)
    given = Context.of(
        *token_BL.shape, token_BL=token_BL, valid_BL=valid_BL, key=jax.random.key(lms.KEY)
    )
    return model(token_BL, given, model.init_gate_state(), train)


@functools.cache
def forward(settings, train):
    """Logits of tokens of which the first ``count`` are valid."""
    params = built(settings)[1]

    def run(token_BL, count):
        valid_BL = jnp.broadcast_to(jnp.arange(L) < count, token_BL.shape)
        return call(settings, params, token_BL, valid_BL, train)[0]

    return jax.jit(run)


CASES = [
    pytest.param(settings, train, id=f"{label(settings)}-{'train' if train else 'eval'}")
    for settings in (DEPTHS, SPARSE, BY_ROUTER, HEADS)
    for train in (True, False)
    if settings is not BY_ROUTER or not train
]


@pytest.mark.quick(2)
@pytest.mark.parametrize(("settings", "train"), CASES)
def test_logits_depend_on_later_tokens_only_where_declared(settings, train):
    """Routed blocks depend on them in training; nothing does in evaluation."""
    changed, run = [], forward(settings, train)
    for seed in range(4):
        token_BL, other_BL = tokens(seed), tokens(seed + 100)
        later_BL = jnp.where(jnp.arange(L) >= L // 2, other_BL, token_BL)
        difference = np.abs(run(token_BL, L) - run(later_BL, L)).max(axis=(0, 2))
        assert difference[L // 2 :].min() > 1e-3, "tokens must see themselves"
        changed.append(difference[: L // 2].max())
    seen = settings.depths.visibility.train_future and train
    assert seen == bool(settings.depths.capacity and train)
    # Rows of a sorted matmul move when other rows come or go; their sums may be blocked otherwise.
    assert max(changed) > 1e-3 if seen else max(changed) <= 1e-6


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "settings", [DEPTHS, SPARSE, slow_unless(False, BY_ROUTER), HEADS], ids=label
)
def test_evaluating_a_whole_sequence_gives_the_logits_of_decoding(settings):
    run, token_BL, other_BL = forward(settings, False), tokens(1), tokens(2)
    whole = run(token_BL, L)
    for count in range(1, L):
        prefix_BL = jnp.where(jnp.arange(L) < count, token_BL, other_BL)
        got = run(prefix_BL, count)[:, count - 1]
        np.testing.assert_allclose(got, whole[:, count - 1], rtol=1e-4, atol=1e-4)


@functools.cache
def graded(mesh_name, remat):
    """Logits, what was found, and gradients of a loss that reaches every parameter."""
    settings = dataclasses.replace(EVERYTHING, remat=remat)

    def objective(params, token_BL, valid_BL):
        TRACED.append(mesh_name)
        logits_BLV, aux = call(settings, params, token_BL, valid_BL, True)
        nats_BL = -jax.nn.log_softmax(logits_BLV)[..., 0]
        logits_BLV = jnp.where(valid_BL[..., None], logits_BLV, 0)
        loss = jnp.mean(jnp.where(valid_BL, nats_BL, 0)) + 0.1 * sum(aux.losses.values())
        return loss, (logits_BLV, aux)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


@functools.cache
def outcome(mesh_name, remat="none"):
    shape = next((s for s in meshes.ALL if meshes.name(s) == mesh_name), None)
    args = built(EVERYTHING)[1], tokens(), jnp.arange(L) < LENGTHS[:, None]
    with meshes.entered(shape):
        (loss, aux), grads = jax.device_get(graded(mesh_name, remat)(*args))
    return loss, aux, to_tree(grads)


def same(got, wanted, tolerance):
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, got, wanted)
    for field in ("tokens", "load_E", "dropped_E", "dropped_L"):
        found = [getattr(aux.stats, field) for _, (_, aux), _ in (got, wanted)]
        np.testing.assert_array_equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [meshes.ALL[4], meshes.ALL[8]],  # eight devices, and eight on all axes
    ids=meshes.name,
)
def test_logits_losses_means_and_gradients_are_the_same_on_every_mesh(shape):
    # float32 sums over the batch and through two layers, in another order.
    same(outcome(meshes.name(shape)), outcome("none"), 2e-5)


@pytest.mark.parametrize(
    "remat", [pytest.param(r, marks=pytest.mark.slow) for r in REMAT if r != "none"]
)
def test_recomputation_changes_nothing(remat):
    same(outcome("none", remat), outcome("none"), 2e-6)


@pytest.mark.slow
def test_every_parameter_has_a_gradient_and_every_layer_reports_once():
    _, (_, aux), grads = outcome("none")
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-7, path
    assert set(aux.means) == {
        "mod/selected", "mod/agreement", "mod/to_experts", "moa/max_vio"
    }  # fmt: skip
    assert {"mod_predictor", "moa_load_balance", "moa_z", "load_balance", "z"} <= set(aux.losses)
    assert all(np.shape(x) == () for x in (*aux.means.values(), *aux.losses.values()))
    # Half of each sequence's valid tokens; experts count who came, in their one layer.
    through = np.ceil(LENGTHS * EVERYTHING.depths.capacity).sum()
    np.testing.assert_allclose(aux.means["mod/selected"], through / LENGTHS.sum(), rtol=1e-6)
    np.testing.assert_array_equal(aux.stats.tokens, [through])
    plain, routed = (set(to_tree(nnx.state(b))) for b in model_of(EVERYTHING).periods.blocks)
    assert routed - plain == {"depths"}


@pytest.mark.slow
def test_other_tokens_and_weights_run_the_same_program():
    program, params = graded("none", "none"), built(EVERYTHING)[1]
    outcome("none")
    before = len(TRACED)
    halved = jax.tree.map(lambda x: x / 2, params)
    (loss, _), _ = program(halved, tokens(7), jnp.arange(L) < LENGTHS[::-1, None])
    assert np.isfinite(loss) and len(TRACED) == before > 0
