"""The probe's forward pass, against the model computed layer by layer in NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import types
from moejax.layers import routing_stats
from moejax.tasks.language.model import LM
from moejax.train.probe.arrays import cosines, router_vectors
from moejax.train.probe.forward import probe_forward
from moejax.train.state import TrainState
from moejax.types import Context
from tests import gates, steps
from tests.steps import BATCH, LENGTH

SAMPLED = 5
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
"""float32 in another program, two layers deep."""


def forward(run, state=None, step=0):
    """``probe_forward`` of two batches of random tokens."""
    parts = [steps.batch(step), steps.batch(step + 1)]
    batches = {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def program(state, batches):
        return probe_forward(state, batches, task=run.task, sampled=SAMPLED)

    with jax.set_mesh(run.mesh):
        state = run.init_state() if state is None else state
        return batches, jax.device_get(state), jax.device_get(jax.jit(program)(state, batches))


def layer_by_layer(run, state, batch):
    """Input and router's logits of each MoE layer, block by block, and the final logits."""
    length = run.config.train.seq_len

    @jax.jit
    def blocks(params, token_BL, valid_BL):
        model: LM = run.task.built(params)
        context = Context.of(len(token_BL), length, token_BL=token_BL, valid_BL=valid_BL)
        x_BLD = model.embed_VD[...][token_BL] * math.sqrt(run.config.model.d_model)
        period, stacked = nnx.split(model.periods)
        inputs = []
        for index in range(run.task.model.num_periods):
            (block,) = nnx.merge(period, jax.tree.map(lambda p, i=index: p[i], stacked)).blocks
            mixed_BLD, _ = block.attention(block.attention_norm(x_BLD), context)
            inputs.append(block.ffn_norm(x_BLD + mixed_BLD))
            x_BLD, *_ = block(x_BLD, context, (), False, None)
        return inputs, model.final_norm(x_BLD) @ model.embed_VD[...].T

    valid = batch["valid"]
    inputs, logits_BLV = blocks(state.params, batch["tokens"][:, :-1], valid)
    inputs = [np.where(valid[..., None], np.asarray(x, np.float64), 0.0) for x in inputs]
    router_MDE = state.params["periods"]["blocks"]["0"]["ffn"]["router"]["router_DE"]
    layers = [(x, x @ router_DE) for x, router_DE in zip(inputs, router_MDE, strict=True)]
    return layers, np.asarray(logits_BLV, np.float64)


def log_sum_exp(x):
    return np.log(np.exp(x).sum(-1))


@pytest.mark.slow
def test_every_array_equals_that_of_the_layers_run_one_by_one():
    run = steps.make({"data": 1}, moe__transport="dropless")
    batches, state, seen = forward(run)
    layers = run.task.model.num_moe_layers
    for part in range(2):
        batch = {name: x[part] for name, x in batches.items()}
        rows = slice(part * BATCH, (part + 1) * BATCH)
        valid = batch["valid"]
        assert not valid.all(), "the batch has padding"
        by_layer, logits_BLV = layer_by_layer(run, state, batch)
        target = np.take_along_axis(logits_BLV, batch["tokens"][:, 1:, None], -1)[..., 0]
        nats_BL = log_sum_exp(logits_BLV) - target
        CLOSE(seen["nats"][rows][valid], nats_BL[valid])
        assert len(by_layer) == layers == 2
        for layer, (x_BLD, h_BLE) in enumerate(by_layer):
            found = {n: x[rows, layer] for n, x in seen.items() if x.shape[:2] == (16, layers)}
            p_BLE = np.exp(h_BLE - log_sum_exp(h_BLE)[..., None])
            sorted_BLE = np.sort(p_BLE, -1)
            for name, wanted in {
                "entropy": -np.sum(p_BLE * np.log(p_BLE), -1),
                "margin": sorted_BLE[..., -1] - sorted_BLE[..., -2],
                "log_z": log_sum_exp(h_BLE),
                "max_logit": np.abs(h_BLE).max(-1),
            }.items():
                CLOSE(found[name][valid], wanted[valid])
            expert_BLK = np.argsort(-h_BLE, -1)[..., :2]
            np.testing.assert_array_equal(found["expert"][valid], expert_BLK[valid])
            chosen = np.take_along_axis(p_BLE, expert_BLK, -1)
            weight_BLK = chosen / chosen.sum(-1, keepdims=True)
            CLOSE(found["weight"][valid], weight_BLK[valid])
            np.testing.assert_array_equal(found["kept"], found["weight"] > 0)  # dropless
            assert not found["weight"][~valid].any()
            # Five of sixteen positions, one further in each sequence.
            at_BS = (np.array([0, 3, 6, 9, 12]) + np.arange(BATCH)[:, None]) % LENGTH
            wanted = np.take_along_axis(x_BLD, at_BS[..., None], 1)
            was_valid = np.take_along_axis(valid, at_BS, 1)
            CLOSE(found["x"][was_valid], wanted[was_valid])
            best_BS = np.take_along_axis(expert_BLK[..., 0], at_BS, 1)
            np.testing.assert_array_equal(found["class"], np.where(was_valid, best_BS, -1))


def cosine(a, b):
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return a @ b / np.sqrt(a @ a * (b @ b))


@pytest.mark.slow
def test_similarities_are_cosines_of_all_of_an_experts_weights_and_of_the_routers_columns():
    run = steps.make({"data": 1}, moe__every=2, model__num_layers=4)
    _, state, seen = forward(run)
    layer = state.params["periods"]["blocks"]["1"]["ffn"]
    experts = run.config.moe.num_experts
    assert seen["expert_similarity"].shape == seen["router_similarity"].shape == (2, experts, 8)
    for m in range(2):
        flat = [
            np.concatenate([layer[n][m, e].ravel() for n in ("gate_EDF", "up_EDF", "down_EFD")])
            for e in range(experts)
        ]
        router_ED = layer["router"]["router_DE"][m].T
        for a in range(experts):
            for b in range(experts):
                wanted = [cosine(flat[a], flat[b]), cosine(router_ED[a], router_ED[b])]
                got = [seen[f"{kind}_similarity"][m, a, b] for kind in ("expert", "router")]
                np.testing.assert_allclose(got, wanted, atol=1e-6)  # float32


def test_a_vector_of_zeros_has_cosine_zero_with_all_and_itself():
    got = cosines([jnp.array([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0]])])
    np.testing.assert_allclose(got, [[1, 0, -1], [0, 0, 0], [-1, 0, 1]], rtol=1e-6)


VECTORS = {
    "router_DE": ("top_k", "shazeer", "base", "sbase", "remoe", "stablemoe", "dense"),
    "centroid_RE": ("xmoe",),
    "inner_DE": ("hierarchical",),
    "": ("hash", "dselect_k", "random"),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name, gate", [(n, g) for n, gates in VECTORS.items() for g in gates])
def test_the_routers_vectors_are_the_gates_matrix_with_one_column_per_expert(name, gate):
    run = steps.make({"data": 1}, gate)
    layer = run.abstract_state.params["periods"]["blocks"]["0"]["ffn"]
    router = jax.tree.map(
        lambda x: jnp.arange(math.prod(x.shape), dtype=jnp.float32).reshape(x.shape),
        layer.get("router", {}),
    )
    found = router_vectors(router)
    if not name:
        assert found is None
        return
    np.testing.assert_array_equal(found, np.swapaxes(router[name], 1, 2))
    turned = {"mine_ED": np.swapaxes(router[name], 1, 2)}
    np.testing.assert_array_equal(router_vectors(turned), found)


QUICK = ("hash", "dense", "expert_choice", "rl", "remoe")
"""Gates without logits, with K = E, that choose per expert, with a policy, with many columns."""


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if row.name in QUICK else pytest.mark.slow, id=row.name)
        for row in gates.ROWS
    ],
)
def test_the_probe_of_every_gate_has_a_float32_router_in_a_bfloat16_model(row):
    base, gate = steps.make({"data": 1}, model__dtype="bfloat16"), row.make()
    model = base.task.model.with_experts(gate=gate)
    task = dataclasses.replace(base.task, model=model)

    def program(batches):
        key, counts_V = jax.random.key(0), np.arange(steps.VOCAB)
        params, gate_state = task.init(key), task.init_gate_state(lambda: counts_V)
        state = TrainState(jnp.int32(0), params, (), gate_state, jax.random.key_data(key))
        return probe_forward(state, batches, task=task, sampled=SAMPLED)

    parts = {name: np.stack([x, x]) for name, x in steps.batch(0).items()}
    seen = jax.eval_shape(program, parts)
    shape, columns = (2 * BATCH, 2, LENGTH), gate.columns(model.moe.num_experts)
    for name in ("expert", "weight", "kept"):
        assert seen[name].shape == (*shape, columns)
    for name in ("entropy", "margin", "log_z", "max_logit"):
        assert (seen[name].shape, seen[name].dtype) == (shape, jnp.float32)
    assert seen["x"].shape == (2 * BATCH, 2, SAMPLED, model.d_model)
    assert seen["weight"].dtype == seen["x"].dtype == seen["nats"].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_the_statistics_for_the_probe_leave_the_training_program_unchanged(remat, monkeypatch):
    """The program is, character for character, that of a layer without the router's statistics."""

    def program(which):
        run = steps.make({"expert": 2}, model__remat=remat, model__num_layers=1)
        with jax.set_mesh(run.mesh):
            return getattr(run, which).lower(*steps.shapes(run)).as_text()

    with_probe = {which: program(which) for which in ("train_step", "eval_step")}

    def silent(**fields):
        return types.MoEInfo(**{**fields, "router": None})

    monkeypatch.setattr(routing_stats, "MoEInfo", silent)
    assert with_probe == {which: program(which) for which in ("train_step", "eval_step")}
    run = steps.make({"data": 1})
    with pytest.raises(AttributeError, match="probs_GTE"):  # the probe needs what was left out
        forward(run)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"expert": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_probe_records_the_same_on_any_mesh(shape):
    one = steps.make({"data": 1})
    many = steps.make(shape)
    _, state, wanted = forward(one)
    with jax.set_mesh(many.mesh):
        state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), state, many.abstract_state
        )
    _, _, found = forward(many, state)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        if x.dtype.kind == "f":
            CLOSE(found[name], x, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], x, err_msg=name)
