"""The layer in user code: preset names, dtypes, uneven batches on a mesh, and wrong arguments."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.contrib.multitask.mmoe import MultiGateMoE
from moejax.dispatch import Cells, Dropless
from moejax.layers.moa import MixtureOfHeads
from moejax.options import AttentionOptions, HeadsOptions, RopeOptions
from tests import meshes
from tests.moes import D, E, F, L, make

pytestmark = pytest.mark.usefixtures("as_installed")
README_MESH = {"data": 2, "expert": 4}


@pytest.fixture
def as_installed():
    """Without the checks of annotations that only this suite has, as in a user's program."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def outcome(layer, x, shape, context):
    """Output, losses, statistics and gradients, in training."""
    graph, params = nnx.split(layer)

    def objective(params, x):
        y, info = nnx.merge(graph, params)(x, context)
        return jnp.sum(jnp.sin(y)) + sum(info.losses.values()), (y, info)

    with meshes.entered(shape):
        step = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
        return jax.device_get(step(params, x))


ODD = [("mixtral", "cells"), ("soft", "cells"), ("lory", "cells")]
ODD_SLOW = [("mixtral", t) for t in ("dropless", "dropless_once", "gather", "all_experts")]
ODD_SLOW += [("smear", "cells"), ("base", "cells"), ("sbase", "cells"), ("shazeer", "cells")]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("gate", "transport"),
    [*ODD, *(pytest.param(*row, marks=pytest.mark.slow) for row in ODD_SLOW)],
)
def test_a_batch_that_does_not_divide_over_the_mesh_gives_the_same_numbers_as_without_a_mesh(
    gate, transport
):
    """Five sequences on eight shards: the padding sequences are computed and never counted."""
    x = jax.random.normal(jax.random.key(1), (5, L, D))
    ctx = moejax.Context.of(5, L, key=jax.random.key(3))
    layer = make(gate, transport=transport, capacity_factor=0.75)
    (value, (y, info)), grads = outcome(layer, x, README_MESH, ctx)
    (value_, (y_, info_)), grads_ = outcome(layer, x, None, ctx)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5)  # sums in another order

    jax.tree.map(close, (value, y, info.losses, grads), (value_, y_, info_.losses, grads_))
    jax.tree.map(np.testing.assert_array_equal, info.kept_GTK, info_.kept_GTK)
    assert info.stats.tokens == 5 * L and info.stats.load_E.sum() == info_.stats.load_E.sum()
    np.testing.assert_array_equal(info.stats.dropped_E, info_.stats.dropped_E)


@pytest.mark.slow
def test_heads_and_shared_gates_accept_batches_that_do_not_divide_over_the_mesh():
    x = jax.random.normal(jax.random.key(1), (5, L, D))
    attention = AttentionOptions(head_dim=8, rope=RopeOptions(theta=None), implementation="xla")
    heads = MixtureOfHeads(D, HeadsOptions(4, 2), attention, rngs=nnx.Rngs(0))
    tables = MultiGateMoE(D, F, 3, 4, 2, gate=gating.make("dense"), rngs=nnx.Rngs(0))

    def run(x):
        return heads(x, moejax.Context.of(5, L))[0], tables(x[:, 0])[0]

    wanted = jax.jit(run)(x)
    with meshes.entered(README_MESH):
        got = jax.jit(lambda x: run(x))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


def test_a_preset_name_sets_the_gate_and_the_layer_arguments_around_it():
    layer = make_by_name("deepseek_moe")
    preset = gating.preset_overrides("deepseek_moe")
    assert layer.gate == gating.make("deepseek_moe")
    assert layer.config.transport == Dropless() and preset["transport"] == "dropless"
    assert layer.shared is not None and layer.shared.up_DF[...].shape == (
        D,
        preset["shared_experts"] * F,
    )
    given = make_by_name("deepseek_moe", transport="cells", num_shared=0)
    assert given.config.transport == Cells() and given.shared is None


def test_a_gate_passed_by_value_does_not_set_preset_arguments():
    layer = moejax.MoE(D, F, E, gate=gating.make("deepseek_moe"), rngs=nnx.Rngs(0))
    assert layer.config.transport == Cells() and layer.shared is None


@pytest.mark.parametrize("name", gating.names())
def test_every_name_makes_a_layer(name):
    fields = {"vocab_size": 11, "entropy_floors": ()}
    if name in ("replay", "deepseek_v2", "deepseek_v3"):
        pytest.skip("needs a recording, or more experts")
    made = jax.eval_shape(lambda: nnx.state(make_by_name(name, **fields)))
    assert made["up_EDF"].get_value().shape == (E, D, F)


def make_by_name(gate, **choices):
    return moejax.MoE(D, F, E, gate=gate, rngs=nnx.Rngs(0), **choices)


def test_dtype_sets_the_computation_and_param_dtype_the_expert_parameters():
    x = jax.random.normal(jax.random.key(0), (4, L, D))
    exact = make_by_name("qwen_moe")
    half = make_by_name("qwen_moe", dtype=jnp.bfloat16, param_dtype="bfloat16")
    y, info = half(x)
    assert y.dtype == jnp.bfloat16 and info.routing.weight_GTK.dtype == jnp.float32
    assert half.shared is not None
    assert half.up_EDF[...].dtype == half.shared.up_DF[...].dtype == jnp.bfloat16
    assert half.router["router_DE"][...].dtype == half.shared_gate_D[...].dtype == jnp.float32
    # The router sees the float32 input, not a rounded one.
    np.testing.assert_array_equal(info.routing.expert_GTK, exact(x)[1].routing.expert_GTK)
    mixed = make_by_name("qwen_moe", dtype="bfloat16")
    assert mixed.up_EDF[...].dtype == jnp.float32 and mixed(x)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(mixed(x)[0], np.float32), exact(x)[0], rtol=0.05, atol=0.02
    )


def test_without_a_dtype_the_output_has_the_dtype_of_the_input():
    x = jnp.ones((4, L, D), jnp.bfloat16)
    assert make_by_name("mixtral")(x)[0].dtype == jnp.bfloat16
    assert make_by_name("mixtral", dtype="float32")(x)[0].dtype == jnp.float32


def x_of(*shape):
    return jnp.ones(shape)


def of(**known):
    return moejax.Context.of(4, L, **known)


CALLS = {
    "rank": ((x_of(4, D),), "x_BLD has shape .4, 8., but this layer takes .B, L, d_model=8."),
    "width": ((x_of(4, L, D + 1),), "x_BLD has shape .*d_model=8"),
    "ids": ((jnp.ones((4, L, D), int),), "x_BLD has dtype int.*embed token ids"),
    "a list": (([1.0],), "x_BLD is a list, not an array"),
    "context": ((x_of(4, L, D), moejax.Context.of(3, L)), r"context.token_BL has shape .3, 6."),
    "valid": ((x_of(4, L, D), of(valid_BL=jnp.ones(L, bool))), r"context.valid_BL has shape .6,."),
    "row": ((x_of(4, L, D), of(row_B=jnp.arange(3))), r"context.row_B has shape .3,.*Context.of"),
    "8 bits": ((x_of(4, L, D).astype(jnp.float8_e4m3fn),), "x_BLD has dtype float8.*or cast"),
    "weights": (
        (x_of(4, L, D), of(valid_BL=jnp.ones((4, L)))),
        "valid_BL has dtype float32; pass b",
    ),
    "token": ((x_of(4, L, D), of(token_BL=jnp.ones((4, L)))), "context.token_BL has dtype float32"),
    "key": ((x_of(4, L, D), of(key=3)), r"context.key=3 is no PRNG key; pass jax.random.key\("),
    "a mask": ((x_of(4, L, D), jnp.ones((4, L), bool)), "context is a .*, not a moejax.Context"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_argument_is_reported_in_one_line(name):
    args, message = CALLS[name]
    with pytest.raises(ValueError, match=message) as found:
        make_by_name("mixtral")(*args)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("gate", ["hash", "stablemoe"])
def test_a_gate_that_routes_by_token_ids_refuses_calls_without_them(gate):
    """Zeros in their place would send every token to one expert."""
    layer, ids = make_by_name(gate, vocab_size=11), jnp.arange(4 * L).reshape(4, L) % 11
    for context in (None, of(key=jax.random.key(0))):
        with pytest.raises(ValueError, match=r"routes by token ids: pass .* token_BL=\.\.\.\)"):
            layer(x_of(4, L, D), context)
    assert layer(x_of(4, L, D), of(token_BL=ids))[1].stats.tokens == 4 * L


@pytest.mark.parametrize(
    ("gate", "state", "message"),
    [
        ("mixtral", {"bias_E": jnp.zeros(E)}, r"gate_state has bias_E \[8\], but gate TopK takes"),
        ("loss_free", (), r"gate_state has nothing, but gate LossFree takes bias_E \[8\]"),
        ("loss_free", {"bias_E": jnp.zeros(3)}, r"has bias_E \[3\].*init_gate_state\(\)"),
    ],
)
def test_a_state_of_another_gate_is_refused(gate, state, message):
    with pytest.raises(ValueError, match=message):
        make_by_name(gate)(x_of(4, L, D), gate_state=state)


MAKES = {
    "no gate": ({"gate": 3}, "gate=3 is neither the name of a gate"),
    "a class": ({"gate": gating.TopK}, "gate=.*TopK.* is neither"),
    "d_ff": ({"d_ff": 0}, "d_ff=0 must be a whole number, at least 1"),
    "d_model": ({"d_model": 8.0}, "d_model=8.0 must be a whole number"),
    "num_shared": ({"num_shared": -1}, "num_shared=-1 must be a whole number, at least 0"),
    "num_tasks": ({"num_tasks": 0}, "num_tasks=0 must be"),
    "dtype": ({"dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16"),
    "param_dtype": ({"param_dtype": "half"}, "param_dtype='half' must be one of"),
    "rngs": ({"rngs": jax.random.key(0)}, "rngs is a .*; pass flax.nnx.Rngs"),
    "capacity": ({"capacity_factor": "1"}, "capacity_factor='1' must be a finite number above 0"),
    "k": ({"gate": gating.make("mixtral", k=9)}, "k=9 must lie between 1 and num_experts=8"),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_wrong_layer_argument_is_reported_in_one_line(name):
    changes, message = MAKES[name]
    arguments = {"d_model": D, "d_ff": F, "num_experts": E, "gate": "mixtral", "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=message) as found:
        moejax.MoE(**{**arguments, **changes})
    assert "\n" not in str(found.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        moejax.UserError, match="gate 'mixtrall' is unknown; did you mean 'mixtral'"
    ):
        make_by_name("mixtrall")


def test_a_group_may_be_given_as_a_number():
    assert make_by_name("mixtral", group=2).config == make_by_name("mixtral", group="2").config


@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 4}, None])
def test_error_messages_of_the_layer_do_not_mention_config_fields(mesh):
    """A user of the layer has no config: `moe.` and `train.` mean nothing to them."""
    with meshes.entered(mesh):
        for call in (
            lambda: make_by_name("mixtral", group="3")(x_of(4, L, D)),
            lambda: moejax.MoE(D, F, 6, gate="mixtral", rngs=nnx.Rngs(0))(x_of(4, L, D)),
            lambda: make_by_name("switch")(x_of(4, L, D)),
        ):
            try:
                call()
            except ValueError as error:
                assert "moe." not in str(error) and "train." not in str(error)
                assert "\n" not in str(error)


@pytest.mark.parametrize("train", ["yes", 1, jnp.bool_(True)])
def test_an_invalid_value_of_train_is_refused(train):
    with pytest.raises(ValueError, match="train=.* must be True, False or None"):
        make()(x_of(4, L, D), train=train)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate", ["mixtral", *(pytest.param(g, marks=pytest.mark.slow) for g in ("smear", "lory"))]
)
def test_forward_mode_works_with_all_experts_and_merged_experts(gate):
    """jvp, linearize and jacfwd against reverse mode; a Hessian-vector product against it twice."""
    layer = make(gate, transport="all_experts")
    x = jax.random.normal(jax.random.key(1), (1, 3, D))
    direction = jax.random.normal(jax.random.key(2), x.shape)
    run = jax.jit(lambda x: layer(x, moejax.Context.of(1, 3, key=jax.random.key(0)))[0])
    total = lambda x: jnp.sum(jnp.sin(run(x)))
    y, slope = jax.jvp(run, (x,), (direction,))
    np.testing.assert_allclose(jax.linearize(run, x)[1](direction), slope, rtol=1e-5, atol=1e-5)
    back = jax.vjp(run, x)[1]
    other = jax.random.normal(jax.random.key(3), y.shape)
    np.testing.assert_allclose(
        jnp.vdot(back(other)[0], direction), jnp.vdot(other, slope), rtol=1e-4, atol=1e-5
    )
    hvp = jax.jvp(jax.grad(total), (x,), (direction,))[1]
    twice = jax.grad(lambda x: jnp.vdot(jax.grad(total)(x), direction))(x)
    np.testing.assert_allclose(hvp, twice, rtol=1e-3, atol=1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("gate", "transport", "instead"),
    [
        ("mixtral", "cells", 'transport="all_experts"'),
        ("mixtral", "dropless", 'transport="all_experts"'),
        ("mixtral", "gather", 'transport="all_experts"'),
        ("soft", "cells", "a gate that does not mix"),
    ],
)
def test_forward_mode_is_refused_by_other_transports_with_a_remedy(gate, transport, instead):
    layer, x = make(gate, transport=transport), x_of(2, L, D)
    with pytest.raises(TypeError, match=f"forward-mode .* use {instead}"):
        jax.jvp(lambda x: layer(x)[0], (x,), (x,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "shape"),
    [("cells", None), ("dropless", None), ("dropless_once", README_MESH), ("gather", README_MESH)],
)
def test_hessian_vector_products_work_with_every_transport(transport, shape):
    """jvp of grad, against the same through all_experts, which is plain JAX."""
    x, direction = (jax.random.normal(jax.random.key(i), (4, L, D)) for i in (1, 2))

    def product(transport):
        layer = make("mixtral", transport=transport, capacity_factor=float(E))
        total = lambda x: jnp.sum(jnp.sin(layer(x)[0]))
        return jax.jit(lambda x, v: jax.jvp(jax.grad(total), (x,), (v,))[1])(x, direction)

    wanted = product("all_experts")
    with meshes.entered(shape):
        got = product(transport)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 8}, "mesh axis 'model' is unknown; .*data, expert, fsdp, tensor"),
        ({"data": 3}, "mesh data=3 needs 3 devices but there are 8; .*devices=jax.devices"),
        ({"expert": -1, "data": 3}, "cannot fill: 8 devices are not a multiple"),
    ],
)
def test_an_impossible_mesh_is_refused_with_its_own_message(shape, message):
    with pytest.raises(moejax.UserError, match=message) as found:
        moejax.make_mesh(shape)
    assert "cpu_devices" not in str(found.value)
