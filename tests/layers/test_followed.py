"""Experts that were chosen elsewhere: weighed by the router, in the right layer, on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import lms, meshes, moes

GATES = [
    ("top_k", {}),
    ("top_k", {"k": 3, "renormalize": False}),
    ("loss_free", {"bias_rate": 0.0, "route_scale": 2.5}),
    ("loss_free", {"score": "softmax", "renormalize": False}),
    ("loss_free", {"score": "sqrt_softplus", "num_groups": 4, "top_groups": 2}),
]
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
"""The same float32 sums in another program."""
REORDERED = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
"""Sums of the same float32 products in another order."""


def some_experts(shape, k, num_experts=moes.E, seed=5):
    """Random distinct ids, in random order."""
    drawn = np.random.default_rng(seed).random((*shape, num_experts))
    return np.argsort(drawn, axis=-1)[..., :k].astype(np.int32)


def graded(layer, x_BLD, context):
    """Output, info and gradients of the parameters under an arbitrary objective."""
    graph, params = nnx.split(layer)

    def objective(params, context):
        y_BLD, info = nnx.merge(graph, params)(x_BLD, context, train=True)
        total = jnp.sum(jnp.sin(2 * y_BLD)) + 0.1 * sum(info.losses.values())
        return total, (y_BLD, info)

    return jax.jit(jax.grad(objective, has_aux=True))(params, context)


@pytest.mark.parametrize(("gate", "fields"), GATES)
def test_a_gate_that_follows_its_own_choice_has_the_same_output_and_gradients(gate, fields):
    layer, x_BLD = moes.make(gate, gate_fields=fields, transport="dropless"), moes.tokens()
    grads, (y_BLD, info) = graded(layer, x_BLD, moes.context())
    own_BLMK = info.routing.expert_GTK[:, :, None]
    again, (same_BLD, followed) = graded(layer, x_BLD, moes.context(expert_BLMK=own_BLMK))
    CLOSE(same_BLD, y_BLD)
    jax.tree.map(CLOSE, again, grads)
    np.testing.assert_array_equal(followed.stats.load_E, info.stats.load_E)
    # In another order, as an engine may return them.
    backwards = moes.context(expert_BLMK=own_BLMK[..., ::-1])
    reordered, (other_BLD, _) = graded(layer, x_BLD, backwards)
    REORDERED(other_BLD, y_BLD)
    jax.tree.map(REORDERED, reordered, grads)
    assert np.abs(np.asarray(again["router"]["router_DE"][...])).max() > 1e-3


def plain(layer, x_BLD, expert_BLK, weigh):
    """Each token's weighted sum over its experts, one at a time."""
    weights = layer.expert_weights()
    logits_BLE = jnp.einsum(
        "bld,de->ble", x_BLD, layer.router["router_DE"][...], precision="highest"
    )
    weight_BLK = weigh(logits_BLE, expert_BLK)
    y_BLD = jnp.zeros_like(x_BLD)
    for e in range(moes.E):
        own = jax.tree.map(lambda w, e=e: w[e], weights)
        share_BL = jnp.sum(jnp.where(expert_BLK == e, weight_BLK, 0.0), axis=-1)
        hidden = jax.nn.silu(x_BLD @ own.gate_EDF) * (x_BLD @ own.up_EDF)
        y_BLD += share_BL[..., None] * (hidden @ own.down_EFD)
    return y_BLD


def softmax_of_the_k(logits_BLE, expert_BLK):
    return jax.nn.softmax(jnp.take_along_axis(logits_BLE, expert_BLK, axis=-1), axis=-1)


def softmax_of_all(logits_BLE, expert_BLK):
    return jnp.take_along_axis(jax.nn.softmax(logits_BLE, axis=-1), expert_BLK, axis=-1)


def sigmoid_shares(logits_BLE, expert_BLK):
    score = jax.nn.sigmoid(jnp.take_along_axis(logits_BLE, expert_BLK, axis=-1))
    return score / score.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("gate", "fields", "weigh"),
    [
        ("top_k", {}, softmax_of_the_k),
        ("top_k", {"renormalize": False}, softmax_of_all),
        ("loss_free", {"sequence_loss": 0.0}, sigmoid_shares),
    ],
)
def test_other_choices_give_the_plain_sum_and_a_gradient_to_the_router(gate, fields, weigh):
    layer = moes.make(gate, gate_fields=fields, transport="dropless")
    x_BLD, expert_BLK = moes.tokens(), some_experts((moes.B, moes.L), 2)
    graph, params = nnx.split(layer)

    def of_layer(params):
        context = moes.context(expert_BLMK=expert_BLK[:, :, None])
        return jnp.sum(jnp.sin(2 * nnx.merge(graph, params)(x_BLD, context, train=True)[0]))

    def of_loop(params):
        return jnp.sum(jnp.sin(2 * plain(nnx.merge(graph, params), x_BLD, expert_BLK, weigh)))

    got, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (of_layer, of_loop))
    jax.tree.map(REORDERED, got, wanted)
    assert np.abs(np.asarray(got[1]["router"]["router_DE"][...])).max() > 1e-3


@pytest.mark.parametrize("shape", [{"expert": 2}, meshes.LARGE], ids=meshes.name)
def test_a_mesh_changes_nothing(shape):
    given = moes.context(expert_BLMK=some_experts((moes.B, moes.L, 1), 2))
    x_BLD = moes.tokens()
    moes.same(moes.run(shape, "top_k", x_BLD, given), moes.run(None, "top_k", x_BLD, given))


def test_a_token_without_ids_follows_the_router_and_padding_visits_nothing():
    layer, x_BLD = moes.make("top_k", transport="dropless"), moes.tokens()
    own = layer(x_BLD, moes.context(), train=False)[1].routing.expert_GTK
    expert_BLMK = some_experts((moes.B, moes.L, 1), 2)
    expert_BLMK[:, 2:4] = -1
    expert_BLMK[:, 5] = 99  # padding may hold anything
    valid_BL = np.ones((moes.B, moes.L), bool)
    valid_BL[:, 5] = False
    given = moes.context(expert_BLMK=jnp.asarray(expert_BLMK), valid_BL=jnp.asarray(valid_BL))
    y_BLD, info = layer(x_BLD, given, train=False)
    expert_GTK = np.asarray(info.routing.expert_GTK)
    np.testing.assert_array_equal(expert_GTK[:, 2:4], own[:, 2:4])
    np.testing.assert_array_equal(expert_GTK[:, :2], expert_BLMK[:, :2, 0])
    assert not np.asarray(info.routing.weight_GTK)[:, 5].any()
    assert int(info.stats.tokens) == moes.B * (moes.L - 1) and np.isfinite(y_BLD).all()
    assert (own[:, :2] != expert_BLMK[:, :2, 0]).any()


# ---------------------------------------------------------------- layers of a model

TWO_IN_A_PERIOD = dataclasses.replace(
    lms.config("top_k", num_layers=5, first_dense=1), global_every=2
)
DENSE_BETWEEN = dataclasses.replace(lms.config("top_k", num_layers=5), dense_layers="1,3")


def experts_of_layers(model, expert_BLMK, settings):
    """The experts that each MoE layer used, [M, B, L, K]."""
    token_BL = lms.tokens()
    given = dataclasses.replace(lms.context(token_BL), expert_BLMK=expert_BLMK)

    def tap(x_BLD, info):
        return {"expert": info.routing.expert_GTK.reshape(*x_BLD.shape[:2], -1)}

    state = model.init_gate_state()
    _, aux = model(token_BL, given, state, True, tap)
    return aux.taps["expert"]


@pytest.mark.parametrize(
    "settings",
    [
        TWO_IN_A_PERIOD,
        DENSE_BETWEEN,
        lms.config("top_k", num_layers=4, every=2),
        dataclasses.replace(TWO_IN_A_PERIOD, remat="experts"),
    ],
    ids=["two in a period", "dense between", "every second", "recomputed"],
)
def test_each_layer_follows_its_own_ids(settings):
    layers = settings.num_moe_layers
    expert_BLMK = some_experts((lms.B, lms.L, layers), 2, lms.E)
    used_MBLK = experts_of_layers(lms.model_of(settings), expert_BLMK, settings)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(used_MBLK), 0, 2), expert_BLMK)
    assert layers > 1 and (expert_BLMK[:, :, 0] != expert_BLMK[:, :, 1]).any()


def test_tokens_that_mixture_of_depths_takes_keep_their_ids():
    settings = lms.config("top_k", num_layers=2, mod_capacity=0.5, mod_every=1)
    # The experts of a token are a function of its id, so that they can be recognised.
    token_BL = lms.tokens()
    expert_BLMK = np.stack([np.asarray(token_BL) % lms.E, (np.asarray(token_BL) + 1) % lms.E], -1)
    expert_BLMK = np.repeat(expert_BLMK[:, :, None], 2, axis=2)
    given = dataclasses.replace(lms.context(token_BL), expert_BLMK=jnp.asarray(expert_BLMK))

    def tap(x_BLD, info):
        routing = info.routing
        return {"expert": routing.expert_GTK, "weight": routing.weight_GTK}

    model = lms.model_of(settings)
    taps = model(token_BL, given, model.init_gate_state(), True, tap)[1].taps or {}
    expert = np.asarray(taps["expert"])[np.asarray(taps["weight"]).all(axis=-1)]
    np.testing.assert_array_equal((expert[:, 0] + 1) % lms.E, expert[:, 1])
    assert 0 < len(expert) < 2 * token_BL.size


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("gate", "change", "message"),
    [
        ("dense", lambda x: x, "gate Dense has no weights for experts that it did not choose"),
        ("top_k", lambda x: x[..., :1], r"has shape \(8, 6, 1, 1\), but .* \(8, 6, 1, 2\)"),
        ("top_k", lambda x: np.repeat(x, 2, axis=2), r"\(8, 6, 2, 2\), but"),
        ("top_k", lambda x: x / 2, "dtype float"),
        ("top_k", lambda x: x + 8, "has ids 8 to 15, but num_experts=8"),
        ("top_k", lambda x: np.stack([x[..., 0], x[..., 0]], -1), "names an expert twice"),
        ("top_k", lambda x: np.where(np.arange(2) == 0, x, -1), "has ids -1 to"),
    ],
)
def test_mistakes_are_one_line(gate, change, message):
    given = moes.context(expert_BLMK=change(some_experts((moes.B, moes.L, 1), 2)))
    with pytest.raises(ValueError, match=message) as error:
        moes.make(gate)(moes.tokens(), given)
    assert "\n" not in str(error.value)


def test_ids_for_other_layers_are_refused_by_the_model():
    expert_BLMK = some_experts((lms.B, lms.L, 3), 2, lms.E)
    with pytest.raises(ValueError, match=r"has shape \(4, 8, 3, 2\), but .*\(4, 8, 4, 2\)"):
        experts_of_layers(lms.model_of(TWO_IN_A_PERIOD), expert_BLMK, TWO_IN_A_PERIOD)


@pytest.mark.parametrize("wrong", [[8, 1], [1, 1], [-1, 1], [-2, 1]])
def test_a_wrong_id_in_a_compiled_program_makes_its_token_nan(wrong):
    layer, x_BLD = moes.make("top_k", transport="dropless"), moes.tokens()
    expert_BLMK = some_experts((moes.B, moes.L, 1), 2)
    expert_BLMK[2, 3, 0] = wrong

    @jax.jit
    def output(expert_BLMK):
        return layer(x_BLD, moes.context(expert_BLMK=expert_BLMK), train=False)[0]

    broken_BL = np.isnan(np.asarray(output(expert_BLMK))).all(axis=-1)
    assert np.argwhere(broken_BL).tolist() == [[2, 3]]


def test_attention_heads_that_are_experts_do_not_follow():
    settings = lms.config("top_k", num_layers=2, moa_experts=4, moa_k=2)
    expert_BLMK = some_experts((lms.B, lms.L, 2), 2, lms.E)
    token_BL = lms.tokens()
    model = lms.model_of(settings)

    def first_input(given):
        """The input of the first MoE layer, behind attention."""
        context = dataclasses.replace(lms.context(token_BL), expert_BLMK=given)
        state = model.init_gate_state()
        taps = model(token_BL, context, state, False, lambda x, info: {"x": x})[1].taps or {}
        return taps["x"][0]

    np.testing.assert_array_equal(first_input(expert_BLMK), first_input(None))
