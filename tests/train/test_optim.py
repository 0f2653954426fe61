"""Optimizers against optax's own, hand-computed schedules, and linear algebra."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from moejax.errors import UserError
from moejax.mesh import make_mesh
from moejax.train.optim import (
    DIRECTIONS,
    decay_mask,
    make_optimizer,
    make_schedule,
    muon_dimensions,
)
from moejax.train.state import shardings


def config(**changes) -> ConfigDict:
    return ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 0.03,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "schedule": "constant",
            "warmup_steps": 0,
            "decay_steps": 0,
            "decay_fraction": 0.2,
            "final_fraction": 0.1,
            "clip_norm": 0.0,
        }
        | changes
    )


SMALL = {
    "embed_VD": (7, 4),
    "norm": {"scale_D": (4,)},
    "ffn": {"router": {"w_DE": (4, 3)}, "up_EDF": (3, 4, 5)},
}
"""One parameter of each kind."""


def random_params(seed: int = 0, shapes: dict = SMALL) -> dict:
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.float32(rng.normal(size=shape)) for shape in leaves])


FULL = {
    "embed_VD": (7, 4),
    "head_DV": (4, 7),
    "final_norm": {"scale_D": (4,)},
    "periods": {
        "attention": {
            "query_DHI": (2, 4, 2, 3),
            "out_HID": (2, 2, 3, 4),
            "norm": {"scale_D": (2, 4)},
        },
        "ffn": {
            "router": {"w_DE": (2, 4, 3), "bias_E": (2, 3)},
            "gate_EDF": (2, 3, 4, 5),
            "down_EFD": (2, 3, 5, 4),
            "bias_EF": (2, 3, 5),
        },
    },
}
"""A model with 2 stacked layers and 3 experts."""


def flat(tree) -> dict:
    def name(path):
        return "/".join(str(key.key) for key in path)

    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@partial(jax.jit, static_argnums=0)
def first_update(optimizer, params, grads) -> Any:
    return optimizer.update(grads, optimizer.init(params), params)


def one_update(cfg: ConfigDict, params, grads) -> Any:
    optimizer, _ = make_optimizer(cfg, 10, params)
    return first_update(optimizer, params, grads)[0]


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_every_optimizer_reduces_a_quadratic_with_one_program(name):
    params, target = random_params(0), random_params(1)
    cfg = config(name=name, learning_rate=0.2, schedule="cosine")
    optimizer, _ = make_optimizer(cfg, 150, params)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    programs = 0

    @jax.jit
    def step(params, state):
        nonlocal programs
        programs += 1
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    start = loss(params)
    for _ in range(150):
        params, state = step(params, state)
    # 150 updates of some 0.1 cover a few units in every coordinate or singular value, and the
    # last ones are small enough to settle.
    assert loss(params) < 0.01 * start
    assert programs == 1


def test_adamw_is_optax_adamw():
    params, grads = random_params(0), random_params(1)
    cfg = config(weight_decay=0.1)
    ours, _ = make_optimizer(cfg, 10, params)
    theirs = optax.adamw(0.03, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decay_mask(params))

    @partial(jax.jit, static_argnums=0)
    def three_updates(optimizer, params, grads):
        state = optimizer.init(params)
        for scale in (1.0, -0.3, 2.0):
            updates, state = optimizer.update(optax.tree.scale(scale, grads), state, params)
            params = optax.apply_updates(params, updates)
        return params

    # The same operations; XLA may fuse them differently: a few units in the last place.
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, three_updates(ours, params, grads), three_updates(theirs, params, grads))


def test_lion_looks_back_by_b1_and_remembers_by_b2():
    """By hand, b1 = 0.5 and b2 = 0.9: the direction is the sign of (memory + gradient) / 2."""
    params = {"scale_D": jnp.zeros(2)}
    optimizer, _ = make_optimizer(config(name="lion", b1=0.5, b2=0.9), 10, params)
    state, directions = optimizer.init(params), []
    for gradient in ([1.0, 1.0], [-0.08, -0.12], [-0.08, -0.08]):
        updates, state = optimizer.update({"scale_D": jnp.asarray(gradient)}, state, params)
        (update,) = jax.tree.leaves(updates)
        directions.append(np.sign(-update).tolist())
    # Memories: 0, then 0.1, then 0.09 - 0.008 = 0.082 and 0.09 - 0.012 = 0.078.
    assert directions == [[1, 1], [1, -1], [1, -1]]


def test_a_gradient_of_the_size_of_eps_moves_adam_half_as_far():
    params = {"scale_D": jnp.ones(3)}
    grads = {"scale_D": jnp.full(3, 0.25)}
    updates = one_update(config(name="adamw", eps=0.25, learning_rate=1.0), params, grads)
    np.testing.assert_allclose(updates["scale_D"], -0.5, rtol=1e-6)  # float32


@pytest.mark.parametrize("name", sorted(DIRECTIONS.keys() - {"sgd"}))
def test_the_first_update_of_a_vector_is_the_learning_rate_whatever_its_gradient(name):
    params = {"scale_D": jnp.ones(2)}
    updates = one_update(config(name=name), params, {"scale_D": jnp.asarray([0.5, -0.5])})
    # Adam's eps is 1e-8 of a gradient of 0.5.
    np.testing.assert_allclose(updates["scale_D"], [-0.03, 0.03], rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_optax_sgd_and_keeps_no_state_without_momentum(momentum):
    params, grads = random_params(0), random_params(1)
    ours, _ = make_optimizer(config(name="sgd", b1=momentum), 10, params)
    theirs = optax.sgd(0.03, momentum=momentum or None)
    updates, state = first_update(ours, params, grads)
    expected, their_state = first_update(theirs, params, grads)
    same = partial(np.testing.assert_allclose, rtol=1e-6)  # float32
    jax.tree.map(same, updates, expected)
    second = ours.update(grads, state, params)[0]
    jax.tree.map(same, second, theirs.update(grads, their_state, params)[0])
    assert any(x.ndim for x in jax.tree.leaves(state)) == bool(momentum)


def test_muon_on_a_plain_matrix_is_optax_muon():
    params = {"w_DF": jnp.float32(np.random.default_rng(0).normal(size=(6, 4)))}
    ours = one_update(config(name="muon"), params, params)
    theirs = optax.contrib.muon(0.03, beta=0.9, consistent_rms=0.2)
    expected, _ = first_update(theirs, params, params)
    # Both run the same Newton-Schulz steps, batched or not: rounding only.
    np.testing.assert_allclose(ours["w_DF"], expected["w_DF"], rtol=1e-4, atol=1e-7)


def test_muon_orthogonalises_every_layers_and_experts_matrix_by_itself():
    params, grads = random_params(0, FULL), random_params(1, FULL)
    # One expert's gradient is far larger: its neighbours' updates must not shrink.
    ffn = grads["periods"]["ffn"]
    ffn["gate_EDF"] = ffn["gate_EDF"].at[0, 1].mul(1e4)
    updates = flat(one_update(config(name="muon", learning_rate=1.0), params, grads))
    matrices = {
        "periods/ffn/gate_EDF": (-1, 4, 5),
        "periods/ffn/down_EFD": (-1, 5, 4),
        "periods/attention/query_DHI": (-1, 4, 6),
        "periods/attention/out_HID": (-1, 6, 4),
    }
    for name, shape in matrices.items():
        singular = np.linalg.svd(np.asarray(updates[name]).reshape(shape), compute_uv=False)
        relative = singular / (0.2 * np.sqrt(max(shape[1:])))
        # Five Newton-Schulz steps bring singular values near 1, not to it (Jordan: 0.7 to 1.2);
        # those that start below 1 % of the norm end lower, and none does here.
        assert relative.min() > 0.5 and relative.max() < 1.3, name


def test_muon_leaves_embeddings_routers_and_vectors_to_adam():
    params, grads = random_params(0, FULL), random_params(1, FULL)
    muon = flat(one_update(config(name="muon"), params, grads))
    adam = flat(one_update(config(name="adamw"), params, grads))
    same = {name for name in adam if np.array_equal(muon[name], adam[name])}
    matrices = {f"periods/attention/{name}" for name in ("query_DHI", "out_HID")}
    matrices |= {f"periods/ffn/{name}" for name in ("gate_EDF", "down_EFD")}
    assert same == set(adam) - matrices


def test_names_without_axis_letters_stand_for_matrices_in_the_last_two_axes():
    params = {"kernel": jnp.ones((2, 3, 4)), "vector": jnp.ones(3), "scale": jnp.ones((2, 3))}
    dimensions = muon_dimensions(params)
    assert dimensions["kernel"] == ((-2,), (-1,))
    assert dimensions["vector"] is None and dimensions["scale"] is None
    assert decay_mask(params) == {"kernel": True, "vector": False, "scale": False}
    assert decay_mask({"bias": jnp.ones((2, 3))}) == {"bias": False}
    assert decay_mask({"gate": {"kernel": jnp.ones((2, 3))}}) == {"gate": {"kernel": False}}


def test_weight_decay_spares_norms_biases_and_gates():
    decayed = {name for name, decays in flat(decay_mask(random_params(0, FULL))).items() if decays}
    assert decayed == {
        "embed_VD",
        "head_DV",
        "periods/attention/query_DHI",
        "periods/attention/out_HID",
        "periods/ffn/gate_EDF",
        "periods/ffn/down_EFD",
    }


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate(name):
    params = random_params()
    zeros = optax.tree.zeros_like(params)
    updates = flat(one_update(config(name=name, weight_decay=0.5), params, zeros))
    for leaf, decays in flat(decay_mask(params)).items():
        expected = -0.03 * 0.5 * flat(params)[leaf] * decays
        np.testing.assert_allclose(updates[leaf], expected, rtol=1e-6, err_msg=leaf)


def test_gradients_are_clipped_by_their_global_norm():
    params = random_params()
    grads = optax.tree.scale(1e4, random_params(1))
    optimizer, _ = make_optimizer(config(clip_norm=2.0), 10, params)
    _, state = first_update(optimizer, params, grads)
    # After one update Adam's first moment is (1 - b1) times the clipped gradient.
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, "mu")), 0.2, rtol=1e-5)


def rates(steps: int, **changes) -> np.ndarray:
    schedule = make_schedule(config(learning_rate=1.0, **changes), steps)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


def test_warm_up_is_linear_and_its_first_update_already_moves():
    rate = rates(100, warmup_steps=10)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert np.all(rate[10:] == 1.0)


def test_cosine_falls_from_the_peak_to_the_final_fraction_at_the_last_update():
    rate = rates(110, warmup_steps=10, schedule="cosine", final_fraction=0.2)
    np.testing.assert_allclose(rate[9], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rate[59], 0.6, rtol=1e-6)  # halfway: the mean of 1 and 0.2
    np.testing.assert_allclose(rate[-1], 0.2, rtol=1e-6)
    assert np.all(np.diff(rate[9:]) < 0)


def test_wsd_is_flat_until_its_linear_decay():
    rate = rates(100, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_fraction=0.0)
    assert np.all(rate[9:80] == 1.0)
    np.testing.assert_allclose(rate[80:], 1 - np.arange(1, 21) / 20, atol=1e-6)
    assert np.all(rates(100, schedule="wsd", decay_fraction=0.0) == 1.0)
    # A decay that would begin before the end of warm-up begins there: over ten updates, not 18.
    rate = rates(20, warmup_steps=10, schedule="wsd", decay_fraction=0.9, final_fraction=0.0)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rate[10:], 1 - np.arange(1, 11) / 10, atol=1e-6)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    for schedule in ("cosine", "wsd", "constant"):
        rate = rates(5, warmup_steps=10, schedule=schedule)
        np.testing.assert_allclose(rate, np.arange(1, 6) / 10, rtol=1e-6)


def test_the_optimizer_uses_the_schedule_it_returns():
    params = {"scale_D": jnp.ones(3)}
    cfg = config(warmup_steps=4, schedule="cosine")
    optimizer, schedule = make_optimizer(cfg, 12, params)
    state = optimizer.init(params)
    update: Any = jax.jit(optimizer.update)
    for step in range(12):
        updates, state = update(params, state, params)
        # Adam's direction for a constant gradient of 1 is 1, up to eps and rounding.
        np.testing.assert_allclose(-updates["scale_D"], schedule(step), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, r"optim.name='adam' is unknown; did you mean 'adamw'\?"),
        ({"schedule": "cosin"}, r"optim.schedule='cosin' is unknown; did you mean 'cosine'\?"),
        ({"learning_rate": 0.0}, "optim.learning_rate=0.0 must be a positive number"),
        ({"learning_rate": float("nan")}, "optim.learning_rate=nan"),
        ({"b2": 1.0}, "optim.b2=1.0 must be at least 0 and below 1"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must be 0 or more"),
        ({"decay_fraction": 1.5}, "optim.decay_fraction=1.5 must be between 0 and 1"),
        ({"clip_norm": -1.0}, "optim.clip_norm=-1.0"),
    ],
)
def test_a_bad_field_is_named_with_its_remedy(change, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(config(**change), 10, {"scale_D": jnp.ones(3)})


@pytest.mark.parametrize("shape", [(4, 64), (64, 4)], ids=["wide", "tall"])
def test_muon_scales_wide_and_tall_matrices_as_optax_muon_of_consistent_size(shape):
    """0.2 sqrt(max(rows, columns)); another side would be 4 times off here."""
    params = {"w_DF": jnp.float32(np.random.default_rng(0).normal(size=shape))}
    ours = one_update(config(name="muon", learning_rate=1.0), params, params)["w_DF"]
    theirs = optax.contrib.muon(1.0, beta=0.9, consistent_rms=0.2)
    np.testing.assert_allclose(ours, first_update(theirs, params, params)[0]["w_DF"], rtol=1e-4)
    # Singular values near 1 make a root mean square of sqrt(4 / (4 * 64)), times 0.2 sqrt(64).
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(ours))), 0.2, rtol=0.2)


STACKS = {
    # Name, shape, and the shape of the matrices that optax gets one by one.
    "many_experts": ("up_EDF", (1, 140, 130, 129), (130, 129)),
    "short_side": ("up_EDF", (2, 140, 150, 16), (150, 16)),
    "layers": ("up_DF", (130, 129, 140), (129, 140)),
    "heads": ("query_DHI", (2, 130, 4, 40), (130, 160)),
    "heads_out": ("out_HID", (2, 4, 40, 130), (160, 130)),
    "experts_bias": ("shift_EF", (130, 140), (140,)),
    "tasks": ("up_MOF", (3, 130, 140), (130, 140)),
    "vector": ("scale_D", (3, 140), (140,)),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name, shape, own", STACKS.values(), ids=STACKS)
def test_adafactor_updates_every_matrix_as_optax_does_it_alone(name, shape, own):
    """Gradients of very different size would show a factor, a threshold or a clip over several."""
    rng = np.random.default_rng(0)
    count = math.prod(shape) // math.prod(own)
    picked = sorted({0, 1, count - 1})
    size_N = np.ones(count, np.float32)
    size_N[1:] = 10.0 ** rng.uniform(-3, 3, count - 1)
    alone = optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.ema(0.9, debias=True)
    )
    direction = DIRECTIONS["adafactor"](config(name="adafactor"), None)
    params = {"periods": {name: jnp.zeros(shape)}}
    state: Any = direction.init(params)
    states = {n: alone.init(jnp.zeros(own)) for n in picked}
    update: Any = jax.jit(direction.update)
    optax_update: Any = jax.jit(alone.update)
    for step in range(3):
        # Growing, so that the clip binds after the first update.
        grads = rng.standard_normal((count, *own), np.float32) * (4.0**step)
        grads *= size_N.reshape(-1, *[1] * len(own))
        ours, state = update({"periods": {name: grads.reshape(shape)}}, state, params)
        ours = np.asarray(ours["periods"][name]).reshape(grads.shape)
        for n in picked:
            wanted, states[n] = optax_update(grads[n], states[n], jnp.zeros(own))
            # The same sums of float32, in another order.
            np.testing.assert_allclose(ours[n], wanted, rtol=2e-4, atol=1e-5)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state[0].squares))
    sides = (count * sum(own)) if min(own) >= 128 and len(own) == 2 else math.prod(shape)
    assert kept == sides


def test_adafactor_clips_an_update_to_a_root_mean_square_of_one():
    """A gradient 100 times the last one would make an update of about 1 / sqrt(1 - beta)."""
    params = {"w_DF": jnp.zeros((8, 8))}
    direction = DIRECTIONS["adafactor"](config(name="adafactor", b1=0.0), None)
    grads = {"w_DF": jnp.float32(np.random.default_rng(0).normal(size=(8, 8)))}
    _, state = direction.update(grads, direction.init(params), params)
    for factor, largest in ((100.0, 1.0), (0.5, 0.9)):
        updates: Any = direction.update(optax.tree.scale(factor, grads), state, params)[0]
        rms = float(jnp.sqrt(jnp.mean(jnp.square(updates["w_DF"]))))
        assert rms == pytest.approx(1.0, rel=1e-5) if factor > 1 else rms < largest


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_optimizer_state_of_an_expert_is_sharded_like_the_expert(name):
    shapes = {
        "periods": {"ffn": {"router": {"w_DE": (2, 128, 8)}, "up_EDF": (2, 8, 128, 256)}},
        "mixture": {"shift_EF": (8, 256)},
    }
    leaves = lambda x: isinstance(x, tuple)
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=leaves)
    optimizer, _ = make_optimizer(config(name=name), 10, params)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, jax.devices())
    kept = jax.eval_shape(optimizer.init, params)
    placed = jax.tree.leaves(shardings(kept, mesh))
    specs = {
        jax.tree_util.keystr(path): (sharding.spec, leaf.shape)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(kept), placed, strict=True
        )
    }
    own = {path: found for path, found in specs.items() if "up_EDF" in path}
    assert own and all(8 in shape for _, shape in own.values())
    for path, (spec, shape) in own.items():
        assert spec[shape.index(8)] == "expert", path
        for size, axis in ((128, "fsdp"), (256, "tensor")):
            assert size not in shape or spec[shape.index(size)] == axis, path
    assert all(spec == PartitionSpec() for path, (spec, _) in specs.items() if "router" in path)
