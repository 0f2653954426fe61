"""Flax's switch between training and evaluation, and its other tools, on this library's modules."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.contrib.multitask.mmoe import MultiGateMoE
from moejax.layers.depths import Depths
from moejax.layers.moa import MixtureOfHeads
from moejax.options import AttentionOptions, DepthsOptions, HeadsOptions, RopeOptions
from moejax.types import EvalStats, LayerAux
from tests import lms
from tests.moes import B, D, F, L, context, make, tokens


def in_training(stats):
    return not isinstance(stats, EvalStats)


def dropped(layer, **call):
    return int(layer(tokens(), context(), **call)[1].stats.dropped_E.sum())


def test_eval_and_train_switch_capacity_and_noise():
    layer = make("mixtral", capacity_factor=0.5)
    assert dropped(layer) > 0
    layer.eval()
    assert dropped(layer) == 0
    layer.train()
    assert dropped(layer) > 0
    noisy, quiet = make("shazeer"), make("shazeer", gate_fields={"min_std": 1.0})
    noisy.eval()
    quiet.eval()
    np.testing.assert_array_equal(noisy(tokens())[0], quiet(tokens())[0])


def test_the_train_argument_of_a_call_overrides_the_switch():
    layer = make("mixtral", capacity_factor=0.5)
    assert dropped(layer, train=False) == 0
    layer.eval()
    assert dropped(layer, train=True) > 0
    assert not in_training(layer(tokens())[1].stats)
    assert in_training(layer(tokens(), train=True)[1].stats)


def test_a_view_and_set_attributes_set_the_switch():
    layer = make("mixtral", capacity_factor=0.5)
    view = nnx.view(layer, deterministic=True)
    assert dropped(view) == 0 < dropped(layer)
    layer.set_attributes(moejax.MoE, deterministic=True)
    assert dropped(layer) == 0


def test_the_switch_survives_split_merge_and_clone_and_distinguishes_programs():
    layer = make("mixtral", capacity_factor=0.5)
    run = nnx.jit(lambda layer: layer(tokens())[1].stats.dropped_E.sum())
    assert run(layer) > 0
    layer.eval()
    assert run(layer) == 0
    assert dropped(nnx.merge(*nnx.split(layer))) == dropped(nnx.clone(layer)) == 0


def test_statistics_gathered_after_eval_cannot_update_the_state():
    layer = make("loss_free")
    layer.eval()
    _, info = layer(tokens())
    with pytest.raises(ValueError, match="evaluation"):
        layer.update_gate_state(layer.init_gate_state(), info.stats)


@pytest.mark.quick(1)
@pytest.mark.parametrize("gate", ["soft", "smear", "expert_choice_causal", "evomoe"])
def test_every_kind_of_gate_is_in_evaluation_mode_after_eval(gate):
    layer = make(gate, gate_fields={"noise_std": 1.0} if gate == "soft" else {})
    ctx = dataclasses.replace(context(), step=jnp.int32(1))
    wanted, _ = layer(tokens(), ctx, train=False)
    trained, _ = layer(tokens(), ctx)
    layer.eval()
    got, info = layer(tokens(), ctx)
    np.testing.assert_array_equal(got, wanted)
    assert not in_training(info.stats) and jnp.abs(trained - wanted).max() > 0


@pytest.mark.slow
def test_the_multi_gate_layer_and_the_heads_are_in_evaluation_mode_after_eval():
    tables = MultiGateMoE(D, F, 3, 4, 2, gate=gating.make("shazeer"), rngs=nnx.Rngs(0))
    x_BD = tokens()[:, 0]
    with pytest.raises(ValueError, match="PRNG key"):
        tables(x_BD)
    tables.eval()
    assert not in_training(tables(x_BD)[1].stats)
    attention = AttentionOptions(head_dim=8, rope=RopeOptions(theta=None), implementation="xla")
    heads: Any = MixtureOfHeads(D, HeadsOptions(4, 1), attention, rngs=nnx.Rngs(0))
    heads.gate = gating.make("shazeer")
    heads.router = nnx.data(
        jax.tree.map(nnx.Param, heads.gate.init(jax.random.key(0), moejax.types.GateSpec(D, 4)))
    )
    with pytest.raises(ValueError, match="PRNG key"):
        heads(tokens(), moejax.Context.of(B, L))
    heads.eval()
    heads(tokens(), moejax.Context.of(B, L))


@pytest.mark.slow
def test_mixture_of_depths_chooses_in_training_and_predicts_after_eval():
    depths = Depths(D, DepthsOptions(capacity=0.5), rngs=nnx.Rngs(0))
    lengths = []

    def change(x, context):
        lengths.append(x.shape[1])
        return x, LayerAux()

    depths(tokens(), moejax.Context.of(B, L), None, change)
    depths.eval()
    depths(tokens(), moejax.Context.of(B, L), None, change)
    assert lengths == [L // 2, L]


@pytest.mark.slow
def test_a_model_passes_the_switch_to_its_layers():
    model = lms.LM(lms.config("mixtral", moe={"capacity_factor": 0.5}), rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(0), (2, 16), 0, 16)
    ctx = moejax.Context.of(2, 16, token_BL=ids)

    def lost(**call):
        stats: Any = model(ids, ctx, model.init_gate_state(), **call)[1].stats
        return int(stats.dropped_E.sum()), in_training(stats)

    assert lost()[0] > 0 and lost()[1]
    model.eval()
    assert lost() == (0, False)
    assert lost(train=True)[0] > 0


@pytest.mark.slow
def test_tabulate_shows_the_layer_without_changing_it():
    layer = make("loss_free", num_shared=1)
    shown = {"console_kwargs": {"width": 240}, "compute_flops": True}
    table = nnx.tabulate(layer, tokens(), context=context(), **shown)
    assert "MoE" in table and "up_EDF" in table and "FFN" in table
    assert layer(tokens())[0].shape == (B, L, D)


@pytest.mark.slow
def test_layers_are_stacked_by_vmap_and_run_by_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return moejax.MoE(D, F, 4, gate="mixtral", rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def forward(x, layer):
        y, info = layer(x)
        return x + y, info.stats.dropped_E

    layers = create(nnx.Rngs(0))
    _, in_training = forward(tokens(), layers)
    layers.eval()
    y, in_evaluation = forward(tokens(), layers)
    assert in_training.shape == (3, 4) and in_evaluation.sum() == 0
    wanted, graph = tokens(), nnx.split(layers)
    for i in range(3):
        one = nnx.merge(graph[0], jax.tree.map(lambda a, i=i: a[i], graph[1]))
        wanted = wanted + one(wanted)[0]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_layer_is_a_jax_pytree():
    layer, x = make(), tokens()
    wanted, _ = layer(x)
    y, _ = jax.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda layer: jnp.sum(layer(x)[0]))(layer)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    doubled, _ = jax.tree.map(lambda a: a * 1, layer)(x)
    np.testing.assert_array_equal(doubled, wanted)


def test_orbax_saves_and_restores_the_state_of_a_layer(tmp_path):
    layer, x = make("loss_free", num_shared=1), tokens()
    gate_state = {"bias_E": jnp.arange(8.0)}
    state = {"layer": nnx.state(layer), "gate": gate_state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        other = make("loss_free", num_shared=1)
        nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other)))
        found = checkpointer.restore(
            tmp_path / "state", {"layer": nnx.state(other), "gate": other.init_gate_state()}
        )
    nnx.update(other, found["layer"])
    np.testing.assert_array_equal(
        other(x, gate_state=found["gate"])[0], layer(x, gate_state=gate_state)[0]
    )


def test_noise_comes_from_the_rngs_of_the_call():
    layer, x = make("switch", gate_fields={"jitter": 0.5}), tokens()
    first, again = layer(x, rngs=nnx.Rngs(0))[0], layer(x, rngs=nnx.Rngs(0))[0]
    other = layer(x, rngs=nnx.Rngs(gate=1))[0]
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 0
    kept = layer(x, context(), rngs=nnx.Rngs(0))[0]
    np.testing.assert_array_equal(kept, layer(x, context())[0])
