"""The multi-task model: features in, one number per task out, whatever is shared between."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import gating
from moejax.contrib.multitask.model import Head, MultiTask, MultiTaskConfig, head_losses, predict
from moejax.options import DispatchOptions
from moejax.types import Context
from tests import meshes

B, F, E = 16, 3, 4
SIZES = (5, 7)
HEADS = (Head("rating", "regression", 3.5, 2.0), Head("liked", "binary"), Head("seconds"))
M = len(HEADS)

CONFIG = MultiTaskConfig(
    heads=HEADS,
    num_dense=F,
    category_sizes=SIZES,
    d_embed=2,
    d_bottom=6,
    d_ff=4,
    d_out=4,
    d_tower=5,
    sharing="mmoe",
    gate_input="example",
    activation="gelu",
    dtype="float32",
    moe=DispatchOptions(num_experts=E).config,
    gate=gating.make("dense"),
)
DSELECT = {
    "gate": gating.make("dselect_k", per_example=False),
    "gate_input": "constant",
    "d_bottom": 0,
}


def model_of(**changes: Any) -> MultiTask:
    return MultiTask(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def batch():
    rng = np.random.default_rng(1)
    dense = jnp.asarray(rng.standard_normal((B, F)), jnp.float32)
    category = jnp.asarray(rng.integers(0, SIZES, (B, 2)), jnp.int32)
    target = np.stack([rng.normal(3.5, 2, B), rng.integers(0, 2, B), rng.normal(size=B)], axis=1)
    return dense, category, jnp.asarray(target, jnp.float32)


def context(padding=2):
    return Context.of(B, 1, valid_BL=jnp.arange(B)[:, None] < B - padding, key=jax.random.key(0))


@functools.cache
def program(mesh_name, changes):
    """Loss, values, what was found, and the gradients of all parameters."""
    del mesh_name
    graph, params = nnx.split(model_of(**dict(changes)))

    def objective(params, dense, category, target, context):
        model = nnx.merge(graph, params)
        value_BM, aux = model(dense, category, context, model.init_gate_state(), True)
        loss_BM = jnp.where(context.valid_BL, head_losses(value_BM, target, HEADS), 0)
        return jnp.sum(loss_BM) + sum(aux.losses.values()), (value_BM, aux)

    return jax.jit(jax.value_and_grad(objective, has_aux=True)), params


def run(shape=None, padding=2, given=None, **changes):
    with meshes.entered(shape):
        name = "none" if shape is None else meshes.name(shape)
        step, params = program(name, tuple(changes.items()))
        return jax.device_get(step(params, *(given or batch()), context(padding)))


@nnx.jit
def evaluate(model, dense, category, context):
    return model(dense, category, context, model.init_gate_state(), False)


def mlp(layer, x):
    """An affine map in numpy."""
    return x @ np.asarray(layer.map_DF[...]) + np.asarray(layer.shift_F[...])


def relu(x):
    return np.maximum(x, 0)


def by_hand(model, dense, category):
    """The whole model without a mixture, in numpy, an example and a task at a time."""
    embed = np.asarray(model.embed_VD[...])
    towers = jax.device_get([getattr(model.towers, n)[...] for n in ("up_MOF", "shift_MF")])
    read_MF, bias_M = np.asarray(model.towers.read_MF[...]), np.asarray(model.towers.bias_M[...])
    value = np.zeros((B, M))
    for b in range(B):
        x = np.concatenate([dense[b], embed[category[b, 0]], embed[SIZES[0] + category[b, 1]]])
        y = mlp(model.shared[1], relu(mlp(model.shared[0], x)))
        for m in range(M):
            value[b, m] = relu(y @ towers[0][m] + towers[1][m]) @ read_MF[m] + bias_M[m]
    return value


def test_a_shared_bottom_consists_of_embeddings_a_network_and_towers():
    model = model_of(sharing="shared_bottom", activation="relu", d_bottom=0)
    dense, category, _ = batch()
    value_BM, aux = evaluate(model, dense, category, context(0))
    wanted = by_hand(model, np.asarray(dense), np.asarray(category))
    np.testing.assert_allclose(value_BM, wanted, rtol=1e-5, atol=1e-5)  # float32 sums
    assert aux.stats is None and not aux.losses
    assert model.shared[0].map_DF[...].shape[1] == E * CONFIG.d_ff


@pytest.mark.parametrize("sharing", ["mmoe", pytest.param("omoe", marks=pytest.mark.slow)])
def test_one_expert_equals_a_shared_bottom(sharing):
    """Its weight is a softmax over itself: 1 for every task."""
    one = {"moe": DispatchOptions(num_experts=1).config, "activation": "relu", "d_bottom": 0}
    mixed, shared = model_of(sharing=sharing, **one), model_of(sharing="shared_bottom", **one)
    expert = jax.tree.map(lambda w: w[0], mixed.mixture.experts())
    shared.shared[0].map_DF[...], shared.shared[0].shift_F[...] = expert.in_EDF, expert.shift_EF
    shared.shared[1].map_DF[...], shared.shared[1].shift_F[...] = expert.out_EFO, expert.shift_EO
    shared.embed_VD[...] = mixed.embed_VD[...]
    nnx.update(shared.towers, nnx.state(mixed.towers))
    dense, category, _ = batch()
    value_BM, aux = evaluate(mixed, dense, category, context(0))
    wanted = by_hand(shared, np.asarray(dense), np.asarray(category))
    np.testing.assert_allclose(value_BM, wanted, rtol=1e-5, atol=1e-5)
    assert aux.stats is not None and (aux.stats.load_E == B).all()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("sharing", "gates"), [("mmoe", M), ("omoe", 1), ("shared_bottom", 0)])
def test_every_gate_is_reported_like_a_layer(sharing, gates):
    (_, (value_BM, aux)), _ = run(sharing=sharing)
    config = dataclasses.replace(CONFIG, sharing=sharing)
    assert (config.num_moe_layers, config.every) == (gates, min(gates, 1))
    if gates:
        assert aux.stats.load_E.shape == (gates, E)
        assert aux.stats.tokens.tolist() == [B - 2] * gates
        assert all(loss.shape == () for loss in aux.losses.values())
    assert value_BM.shape == (B, M) and aux.mean_square.shape == (2,)


@pytest.mark.quick(1)
@pytest.mark.parametrize("changes", [{}, DSELECT, {"sharing": "shared_bottom"}])
def test_every_parameter_has_a_gradient(changes):
    _, grads = run(**changes)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(gradient).all(), jax.tree_util.keystr(path)
        assert np.abs(gradient).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        pytest.param(shape, ({}, DSELECT)[i % 2], id=f"{meshes.name(shape)}-{i % 2}")
        for i, shape in enumerate(meshes.ALL[1::2])
    ],
)
def test_a_mesh_changes_nothing(shape, changes):
    shape = {k: v if k != "expert" else min(v, E) for k, v in shape.items()}
    got, wanted = run(shape, **changes), run(None, **changes)
    # Sums over the batch in another order, in float32.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, got, wanted)
    np.testing.assert_array_equal(got[0][1][1].stats.load_E, wanted[0][1][1].stats.load_E)


def test_padding_may_hold_anything():
    dense, category, target = batch()
    poisoned = (dense.at[-2:].set(jnp.nan), category.at[-2:].set(2**30), target)
    jax.tree.map(np.testing.assert_array_equal, run(given=poisoned)[1], run()[1])


def test_losses_are_squared_error_in_units_of_the_spread_and_log_loss():
    _, _, target = batch()  # the rating's is standardised, as a table's
    value = jnp.asarray(np.random.default_rng(2).normal(size=(B, M)), jnp.float32)
    loss = np.asarray(head_losses(value, target, HEADS))
    error_BM = predict(value, HEADS) - predict(target, HEADS)
    np.testing.assert_allclose(loss[:, 0], error_BM[:, 0] ** 2 / 4, rtol=1e-4)
    np.testing.assert_allclose(predict(value, HEADS)[:, 0], 3.5 + 2 * value[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(predict(value, HEADS)[:, 1], value[:, 1])
    chance = 1 / (1 + np.exp(-np.asarray(value[:, 1])))
    t = np.asarray(target[:, 1])
    wanted = -t * np.log(chance) - (1 - t) * np.log(1 - chance)
    np.testing.assert_allclose(loss[:, 1], wanted, rtol=1e-4)
    np.testing.assert_allclose(loss[:, 2], (value - target)[:, 2] ** 2, rtol=1e-4)
    far = head_losses(jnp.full((1, M), 1e4), jnp.zeros((1, M)), HEADS)
    assert np.isfinite(far).all()


def test_configurations_without_tasks_or_features_are_refused():
    for change, message in [
        ({"sharing": "all"}, "sharing='all' is unknown; use one of mmoe, omoe"),
        ({"heads": ()}, "name at least one target"),
        ({"num_dense": 0, "category_sizes": ()}, "no features to predict from"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **change)
