"""Experts that tasks share, one gate per task: against loops, by itself, and on every mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import gating
from moejax.contrib.multitask.mmoe import MultiGateMoE, check_gate, dense_weights
from moejax.types import Context, Routing
from tests import meshes

B, D, F, O, E, M = 16, 6, 5, 4, 8, 3
KEY = jax.random.key(3)

GATES = {
    "dense": ("dense", {}, "example"),
    "top_k": ("top_k", {"k": 2}, "example"),
    "static top_k": ("top_k", {"k": 2}, "constant"),
    "dselect_k": ("dselect_k", {"k": 2}, "example"),
    "static dselect_k": ("dselect_k", {"k": 2, "per_example": False}, "constant"),
    "cut dselect_k": ("dselect_k", {"k": 2, "max_active": 3}, "example"),
    "shazeer": ("shazeer", {"k": 2}, "example"),
    "loss_free": ("loss_free", {"k": 2, "bias_rate": 0.1}, "example"),
}
"""Gate, fields, what it sees."""

OFTEN = ("dense", "static top_k", "cut dselect_k", "shazeer")
TWO = ["cut dselect_k", pytest.param("dense", marks=pytest.mark.slow)]
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in GATES]


@functools.cache
def layer_of(name, num_gates=M, experts=E):
    """A layer whose gates decide something: some start at zero, where experts tie."""
    gate, fields, sees = GATES[name]
    layer = MultiGateMoE(
        D, F, O, experts, num_gates, gate=gating.make(gate, **fields), gate_input=sees,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    rng = np.random.default_rng(2)
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        scale = 0.2 if "dselect" in name else 0.5
        if path[0] == "router" or str(path[0]).startswith("shift"):
            variable[...] = jnp.asarray(scale * rng.standard_normal(variable.shape), jnp.float32)
    return layer


def examples(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, D))


def valid_of(padding=3):
    return jnp.arange(B)[:, None] < B - padding


@functools.cache
def program(name, mesh_name, train=True):
    del mesh_name
    graph, params = nnx.split(layer_of(name))

    def objective(params, x_BD, context):
        y, info = nnx.merge(graph, params)(x_BD, context, train=train)
        total = jnp.sum(jnp.sin(2 * y)) + sum(jnp.sum(v) for v in info.losses.values())
        return total, (y, info)

    # On the host: what was made under a mesh of some devices does not go with what was not.
    params = jax.device_get(params)
    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True)), params


def run(name, shape=None, train=True, x_BD=None, **known):
    context = Context.of(B, 1, **{"key": KEY, "valid_BL": valid_of(), **known})
    with meshes.entered(shape):
        step, params = program(name, "none" if shape is None else meshes.name(shape), train)
        return jax.device_get(step(params, examples() if x_BD is None else x_BD, context))


def outputs_by_hand(name):
    """Every expert on every example, expert by expert, in numpy: [E, B, O]."""
    w, x_BD = jax.device_get(layer_of(name).experts()), np.asarray(examples())
    return np.stack([
        np.maximum(x_BD @ w.in_EDF[e] + w.shift_EF[e], 0) @ w.out_EFO[e] + w.shift_EO[e]
        for e in range(E)
    ])  # fmt: skip


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_each_gates_weighted_sum_of_experts(name):
    """Against a loop over examples, gates and the pairs of the routing that the layer returns."""
    (_, (y_MBO, info)), _ = run(name)
    out_EBO, wanted = outputs_by_hand(name), np.zeros((M, B, O))
    for m, b in np.ndindex(M, B):
        pairs = zip(info.routing.expert_GTK[m, b, 0], info.routing.weight_GTK[m, b, 0], strict=True)
        for expert, weight in pairs:
            wanted[m, b] += weight * out_EBO[expert, b]
    np.testing.assert_allclose(y_MBO, wanted, rtol=1e-5, atol=1e-5)  # float32 sums of 8 experts
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2, "the gates must differ"


def test_dense_gates_are_softmax_mixtures():
    """f_m = sum_e softmax(x W_m)_e f_e(x), the equation of the paper."""
    (_, (y_MBO, _)), _ = run("dense", valid_BL=valid_of(0))
    layer, out_EBO = layer_of("dense"), outputs_by_hand("dense")
    logits_MBE = np.asarray(examples()) @ np.asarray(layer.router["router_DE"][...])
    share_MBE = np.exp(logits_MBE) / np.exp(logits_MBE).sum(axis=-1, keepdims=True)
    wanted = np.einsum("mbe,ebo->mbo", share_MBE, out_EBO)
    np.testing.assert_allclose(y_MBO, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["static top_k", pytest.param("static dselect_k", marks=pytest.mark.slow)]
)
def test_a_gate_with_a_constant_input_has_one_choice_for_all_examples(name):
    (_, (_, info)), _ = run(name, valid_BL=valid_of(0))
    expert_GTK, weight_GTK = info.routing.expert_GTK, info.routing.weight_GTK
    np.testing.assert_array_equal(expert_GTK, np.broadcast_to(expert_GTK[:, :1], expert_GTK.shape))
    np.testing.assert_array_equal(weight_GTK, np.broadcast_to(weight_GTK[:, :1], weight_GTK.shape))
    assert np.abs(weight_GTK[0] - weight_GTK[1]).max() > 1e-3 or "top_k" in name


@functools.cache
def alone(name):
    """The layer with one gate, jitted, as a function of that gate's parameters."""
    graph, template = nnx.split(layer_of(name, num_gates=1))
    experts = nnx.to_pure_dict(nnx.state(layer_of(name)))

    @jax.jit
    def one(router):
        nnx.replace_by_pure_dict(template, dict(experts, router=router))
        padded = Context.of(B, 1, valid_BL=valid_of())
        return nnx.merge(graph, template)(examples(), padded)

    return one, experts["router"]


@pytest.mark.parametrize("name", TWO)
def test_identical_gates_equal_one_gate_for_all_tasks(name):
    one, router = alone(name)
    step, params = program(name, "none")
    alike = nnx.to_pure_dict(params)
    alike["router"] = jax.tree.map(lambda w: jnp.repeat(w[:1], M, 0), router)
    params = jax.tree.map(lambda x: x, params)  # a copy
    nnx.replace_by_pure_dict(params, alike)
    context = Context.of(B, 1, key=KEY, valid_BL=valid_of())
    (_, (y_MBO, info)), _ = step(params, examples(), context)
    y_1BO, info_1 = one(jax.tree.map(lambda w: w[:1], router))
    for m in range(M):
        np.testing.assert_allclose(y_MBO[m], y_1BO[0], rtol=1e-6, atol=1e-6)  # one einsum or three
        np.testing.assert_array_equal(info.stats.load_E[m], info_1.stats.load_E[0])


@pytest.mark.parametrize("name", TWO)
def test_statistics_and_losses_of_a_gate_equal_those_of_the_gate_alone(name):
    """Arrays lead with tasks: one gate's numbers do not depend on the other gates."""
    one, router = alone(name)
    (_, (_, info)), _ = run(name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    for m in range(M):
        _, own = one(jax.tree.map(lambda w, m=m: w[m : m + 1], router))
        jax.tree.map(lambda a, b, m=m: close(a[m], b[0]), info.stats, own.stats)
        jax.tree.map(lambda a, b, m=m: close(a[m], b[0]), info.losses, own.losses)
    assert info.stats.tokens.tolist() == [B - 3] * M
    assert (info.stats.dropped_E.sum() > 0) == (name == "cut dselect_k")


def same(got, wanted):
    """Routing and counts exactly; sums over the batch in another order, in float32."""
    (value, (y, info)), grads = got
    (value_, (y_, info_)), grads_ = wanted
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(value, value_)
    close(y, y_)
    jax.tree.map(close, (info.losses, grads), (info_.losses, grads_))
    np.testing.assert_array_equal(info.routing.expert_GTK, info_.routing.expert_GTK)
    for field in ("tokens", "load_E", "dropped_E", "dropped_K", "unserved_tokens"):
        np.testing.assert_array_equal(getattr(info.stats, field), getattr(info_.stats, field))
    close(info.stats.prob_E, info_.stats.prob_E)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("shape", "name"),
    [({"expert": 2}, "dense"), (meshes.LARGE, "shazeer")],
)
def test_a_mesh_changes_nothing(shape, name):
    same(run(name, shape), run(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param(shape, name, id=f"{meshes.name(shape)}-{name}")
        for shape, name in zip(meshes.ALL, itertools.cycle(GATES), strict=False)
    ],
)
def test_every_mesh_gives_the_same_results(shape, name):
    same(run(name, shape), run(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    _, (params, x_BD) = run(name)
    for path, gradient in jax.tree_util.tree_leaves_with_path(params):
        gradient = np.abs(gradient)
        assert np.isfinite(gradient).all() and gradient.max() > 1e-6, jax.tree_util.keystr(path)
        if "router" in jax.tree_util.keystr(path):  # each gate learns
            assert (gradient.reshape(M, -1).max(axis=1) > 1e-7).all()
    assert np.abs(x_BD[: B - 3]).min(axis=0).max() > 0


def test_padding_is_neither_computed_nor_counted():
    poisoned = jnp.where(valid_of(), examples(), jnp.nan)
    got, wanted = run("static top_k", x_BD=poisoned), run("static top_k")
    same(got, wanted)
    assert not got[1][1][B - 3 :].any()


def test_an_inactive_column_has_neither_weight_nor_gradient():
    """The second column, of expert 2 or 0, has weight 0; both columns may name one expert."""
    expert_GTK = jnp.asarray([[[2, 0], [1, 1]]], jnp.int32)
    weight_GTK = jnp.asarray([[[0.5, 0.0], [0.25, 0.0]]])
    worth_E = jnp.asarray([3.0, 5.0, 7.0])

    def total(weight_GTK):
        weight_GTE = dense_weights(Routing(expert_GTK, weight_GTK), 3)
        return jnp.sum(weight_GTE * worth_E), weight_GTE

    slope_GTK, weight_GTE = jax.grad(total, has_aux=True)(weight_GTK)
    np.testing.assert_array_equal(weight_GTE, [[[0, 0, 0.5], [0, 0.25, 0]]])
    np.testing.assert_array_equal(slope_GTK, [[[7, 0], [5, 0]]])


def test_noise_depends_on_the_example_and_on_the_gate():
    rows = jnp.arange(B)
    order = jnp.asarray(np.random.default_rng(0).permutation(B))
    (_, (_, info)), _ = run("shazeer", row_B=rows, valid_BL=valid_of(0))
    moved_rows = {"x_BD": examples()[order], "row_B": rows[order], "valid_BL": valid_of(0)}
    (_, (_, moved)), _ = run("shazeer", None, True, **moved_rows)
    np.testing.assert_array_equal(moved.routing.expert_GTK, info.routing.expert_GTK[:, order])


def test_each_gates_state_is_updated_from_its_own_counts():
    layer = layer_of("loss_free")
    _, info = nnx.jit(lambda layer: layer(examples()))(layer)
    state = layer.init_gate_state()
    after = layer.update_gate_state(state, info.stats)
    changed = jax.tree.leaves(after)[0]
    assert changed.shape[0] == M and np.abs(changed[0] - changed[1]).max() > 0
    for m in range(M):
        own = jax.tree.map(lambda x, m=m: x[m], (state, info.stats))
        jax.tree.map(
            lambda a, b, m=m: np.testing.assert_array_equal(a[m], b),
            after,
            layer.gate.update(*own),
        )


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("expert_choice", "routes an example by others"),
        ("base", "routes an example by others"),
        ("hash", "reads tokens or sequences"),
        ("sentence", "reads tokens or sequences"),
        ("task", "reads tokens or sequences"),
        ("forced", "reads tokens or sequences"),
        ("stablemoe", "reads tokens or sequences"),
        ("rl", "is trained by a policy gradient"),
    ],
)
def test_gates_that_need_more_than_one_example_are_refused(gate, message):
    with pytest.raises(ValueError, match=message):
        check_gate(gating.make(gate), E, "example")


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="gate_input='always' is unknown"):
        check_gate(gating.make("dense"), E, "always")
    check_gate(gating.make("dselect_k", per_example=False), E, "constant")
    with pytest.raises(ValueError, match=r"gate.per_example=True with gate_input=constant"):
        check_gate(gating.make("dselect_k"), E, "constant")
    with pytest.raises(ValueError, match="use relu or gelu"):
        MultiGateMoE(
            D, F, O, E, M, gate=gating.make("dense"), activation="swiglu", rngs=nnx.Rngs(0)
        )
    with meshes.entered({"expert": 8}), pytest.raises(ValueError, match="num_experts=6"):
        layer = MultiGateMoE(D, F, O, 6, M, gate=gating.make("dense"), rngs=nnx.Rngs(0))
        jax.eval_shape(lambda: layer(examples()))
