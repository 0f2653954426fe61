"""The layer as a user calls it: alone, in a model, under any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import reference
from moejax.experts import ffn_one
from tests import meshes
from tests.moes import B, D, E, L, context, make, run, same, tokens

GATES = ["switch", "mixtral", "shazeer", "gshard", "dense"]


@pytest.mark.parametrize(
    ("shape", "gate"),
    [
        pytest.param(
            shape, gate, id=f"{meshes.name(shape)}-{gate}",
            marks=() if (shape, gate) == (meshes.LARGE, "shazeer") else pytest.mark.slow,
        )
        for shape, gate in [(meshes.SMALL, "switch"), *((meshes.LARGE, gate) for gate in GATES)]
    ],
)  # fmt: skip
def test_a_mesh_changes_nothing(shape, gate):
    """Noise, routing, drops, losses and every gradient, in training with drops."""
    x, ctx = tokens(), context()
    wanted = run(None, gate, x, ctx, capacity_factor=1.0)
    same(run(shape, gate, x, ctx, capacity_factor=1.0), wanted)
    if gate != "dense":
        assert wanted[0][1][1].stats.dropped_E.sum() > 0


@pytest.mark.quick(1)
@pytest.mark.parametrize(("gate", "group"), [("mixtral", "4"), ("shazeer", "batch")])
def test_groups_that_do_not_divide_over_the_mesh_give_the_same_results(gate, group):
    """Two groups, or one, on eight devices: selection works on gathered logits."""
    x, ctx = tokens(), context()
    choices = {"transport": "dropless", "group": group}
    same(run(meshes.LARGE, gate, x, ctx, **choices), run(None, gate, x, ctx, **choices))


PRIORITIES = ["position", "choice", "gate", "random"]
PAIRWISE = [
    pytest.param(shape, GATES[i % 5], PRIORITIES[i % 4], id=meshes.name(shape))
    for i, shape in enumerate(meshes.ALL)
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "gate", "priority"), PAIRWISE)
def test_every_mesh_gives_the_same_results(shape, gate, priority):
    x, ctx = tokens(), context()
    choices = {"capacity_factor": 1.0, "priority": priority, "num_shared": 1}
    same(run(shape, gate, x, ctx, **choices), run(None, gate, x, ctx, **choices))


@pytest.mark.quick(1)
@pytest.mark.parametrize("group", ["sequence", "2"])
def test_permuting_the_batch_permutes_the_result(group):
    """A sequence keeps its noise (which belongs to its row id) and its slots wherever it lies."""
    x = tokens()
    order = jnp.asarray([2, 3, 6, 7, 4, 5, 0, 1])  # keeps groups of two whole
    rows = jnp.arange(B)
    choices = {"capacity_factor": 1.0, "group": group}
    _, (y, info) = run(None, "shazeer", x, context(row_B=rows), **choices)[0]
    _, (moved, moved_info) = run(None, "shazeer", x[order], context(row_B=rows[order]), **choices)[
        0
    ]
    np.testing.assert_allclose(moved, y[order], rtol=1e-6, atol=1e-6)  # same sums, same order
    np.testing.assert_array_equal(moved_info.stats.load_E, info.stats.load_E)
    assert info.stats.dropped_E.sum() > 0


def test_the_layer_equals_the_reference_on_the_pairs_it_kept():
    layer, x = make(capacity_factor=1.0), tokens()
    y, info = layer(x)
    wanted = reference.moe(x, info.routing, layer.expert_weights(), "swiglu", info.kept_GTK)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    assert 0 < info.kept_GTK.sum() < info.kept_GTK.size


@pytest.mark.parametrize("transport", ["cells", "dropless", "gather", "all_experts"])
def test_one_expert_equals_an_ffn(transport):
    layer, x = make("top_k", experts=1, gate_fields={"k": 1}, transport=transport), tokens()
    y, _ = layer(x)
    one = jax.tree.map(lambda w: w[0], layer.expert_weights())
    np.testing.assert_allclose(
        y.reshape(-1, D), ffn_one(one, x.reshape(-1, D), "swiglu"), rtol=1e-5, atol=1e-6
    )


def test_shared_experts_are_added_to_the_routed_ones():
    layer, x = make(num_shared=2), tokens()
    y, info = layer(x)
    routed = reference.moe(x, info.routing, layer.expert_weights(), "swiglu", info.kept_GTK)
    assert layer.shared is not None
    np.testing.assert_allclose(y, routed + layer.shared(x), rtol=1e-5, atol=1e-5)


def test_a_shared_gate_weighs_the_shared_experts_by_a_sigmoid_of_the_token():
    layer, x = make(num_shared=1, shared_gate=True), tokens()
    layer.shared_gate_D[...] = jax.random.normal(jax.random.key(5), (D,))
    share = 1 / (1 + np.exp(-np.asarray(x @ layer.shared_gate_D[...], np.float64)))
    assert layer.shared is not None
    wanted = 3 + share[..., None] * layer.shared(x)
    got = layer._with_shared(x, jnp.full(x.shape, 3.0))  # added to what the routed experts say
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.quick(4)
@pytest.mark.parametrize(("transport", "gate", "fields"), [
    ("cells", "switch", {}), ("dropless", "mixtral", {"k": 2}), ("cells", "shazeer", {"k": 4}),
    ("dropless", "top_k", {"k": 8}), ("dropless", "top_k", {"k": 1, "renormalize": False}),
    ("cells", "top_k", {"k": 3, "renormalize": False}), ("dropless", "shazeer", {"k": 2}),
    ("cells", "gshard", {}), ("dropless", "dense", {}),
])  # fmt: skip
def test_the_task_gradient_reaches_the_router(transport, gate, fields):
    """Without any auxiliary loss, and for every k."""
    layer = make(gate, gate_fields=fields, transport=transport)
    if gate == "shazeer":  # starts at zero, where the k kept logits tie
        layer.router["router_DE"][...] = jax.random.normal(jax.random.key(5), (D, E)) * 0.3
    graph, params = nnx.split(layer)

    def task(params):
        y, _ = nnx.merge(graph, params)(tokens(), context())
        return jnp.sum(jnp.sin(y))

    grads = nnx.to_pure_dict(jax.grad(task)(params))["router"]["router_DE"]
    assert jnp.isfinite(grads).all() and jnp.abs(grads).max() > 1e-4


@pytest.mark.parametrize(("gate", "fields"), [("mixtral", {"k": 1}), ("shazeer", {"k": 1})])
def test_a_router_without_task_gradient_is_refused_in_training_only(gate, fields):
    layer = make(gate, gate_fields=fields)
    with pytest.raises(ValueError, match=r"gate\.k=1 .*no gradient"):
        layer(tokens(), context())
    layer(tokens(), context(), train=False)


def test_padding_visits_no_expert_and_is_never_counted():
    valid = jnp.arange(L) < jnp.asarray([6, 5, 4, 3, 2, 1, 0, 6])[:, None]
    layer, x = make(capacity_factor=8.0), tokens()
    poisoned = jnp.where(valid[..., None], x, 1e9)
    y, info = layer(x, context(valid_BL=valid))
    y_, info_ = layer(poisoned, context(valid_BL=valid))
    np.testing.assert_array_equal(np.asarray(y)[valid], np.asarray(y_)[valid])
    assert not np.asarray(y)[~np.asarray(valid)].any()
    assert info.stats.tokens == valid.sum() and info.stats.load_E.sum() == 2 * valid.sum()
    # The same sums of the same numbers.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), info.losses, info_.losses
    )


def test_padding_takes_no_slots():
    """Tokens behind a padded stretch find the room that padding would have taken."""
    layer, x = make(capacity_factor=1.0), tokens()
    same_token = jnp.broadcast_to(x[:1, :1], x.shape)  # all want the same two experts
    valid = jnp.broadcast_to(jnp.arange(L) >= L - 2, (B, L))
    _, info = layer(same_token, context(valid_BL=valid))
    assert info.stats.load_E.sum() == 4 * B and info.stats.dropped_E.sum() == 0


def test_every_drop_is_counted_by_expert_and_position():
    _, info = make(capacity_factor=0.5)(tokens())
    active = np.asarray(info.routing.weight_GTK) > 0
    lost = active & ~np.asarray(info.kept_GTK)
    np.testing.assert_array_equal(info.stats.dropped_L, lost.sum((0, 2)))
    by_expert = np.bincount(np.asarray(info.routing.expert_GTK)[lost], minlength=E)
    np.testing.assert_array_equal(info.stats.dropped_E, by_expert)
    assert info.stats.unserved_tokens == (~(active & np.asarray(info.kept_GTK)).any(-1)).sum() > 0


def test_bfloat16_tokens_are_routed_in_float32():
    layer, x = make(), tokens().astype(jnp.bfloat16)
    y, info = layer(x)
    _, exact = layer(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and info.routing.weight_GTK.dtype == jnp.float32
    np.testing.assert_array_equal(info.routing.expert_GTK, exact.routing.expert_GTK)
    np.testing.assert_array_equal(info.routing.weight_GTK, exact.routing.weight_GTK)


def test_evaluation_draws_no_noise_and_drops_nothing():
    layer = make("switch", capacity_factor=0.5)
    y, info = layer(tokens(), context(), train=False)
    other, _ = layer(tokens(), dataclasses.replace(context(), key=None), train=False)
    np.testing.assert_array_equal(y, other)
    assert info.kept_GTK.all()


def test_noise_without_a_key_is_refused():
    with pytest.raises(ValueError, match="pass a context with a PRNG key"):
        make("switch")(tokens(), train=True)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"transport": "teleport"}, "transport='teleport' is unknown"),
        ({"priority": "loudest"}, "priority='loudest' is unknown"),
        ({"group": "many"}, "group='many' is unknown"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be"),
        ({"activation": "sine"}, "activation='sine' is unknown"),
        ({"balance_scope": "world"}, "balance_scope='world' is unknown"),
        ({"gate_fields": {"k": 9}}, "k=9 must lie between 1 and num_experts=8"),
    ],
)
def test_options_that_cannot_work_are_refused_at_construction(choices, message):
    with pytest.raises(ValueError, match=message):
        make(**choices)


def test_explicit_mesh_axes_are_refused_with_the_remedy():
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="AxisType.Auto"):
        make()(tokens())


def test_a_mesh_without_our_axes_changes_nothing():
    """A user's mesh without our axes: the layer is plain XLA code under it."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    layer, x = make(), tokens()
    wanted, _ = layer(x)
    with jax.set_mesh(mesh):
        y, _ = jax.jit(lambda x: layer(x))(x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
