"""The vision transformer: its patches, positions, meshes, gradients and learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax import gating
from moejax.mesh import make_mesh
from moejax.options import AttentionOptions, DispatchOptions, FFNOptions, MoEOptions, RopeOptions
from moejax.tasks.images.dataset import load_images
from moejax.tasks.images.model import ViT, ViTConfig, patches
from moejax.tasks.images.source import image_train_batches
from moejax.tasks.task import from_tree, to_tree
from moejax.train.state import partition_spec, shardings
from moejax.types import Context
from tests import meshes

B, SIZE, CLASSES, D, E = 16, 8, 10, 16, 8
SETTINGS = ViTConfig(
    d_model=D,
    num_layers=2,
    every=2,
    attention=AttentionOptions(
        head_dim=4, rope=RopeOptions(theta=None), causal=False, implementation="xla"
    ),
    ffn=FFNOptions(d_ff=32, activation="gelu"),
    experts=MoEOptions(
        gate=gating.make("mixtral"),
        config=DispatchOptions(num_experts=E, capacity_factor=1.05).config,
        d_ff=16,
        activation="gelu",
    ),
    image_size=SIZE,
    patch_size=2,
    channels=1,
    num_classes=CLASSES,
)
L = SETTINGS.num_patches
LEARNING_RATE = 1e-2


@functools.cache
def built():
    return nnx.split(ViT(SETTINGS, rngs=nnx.Rngs(3)))


@functools.cache
def digits():
    return load_images()


def image_batch(step=0):
    return {k: jnp.asarray(v) for k, v in image_train_batches(digits(), B, 0).batch(step).items()}


def apply(params, batch, train):
    graph, template = built()
    model = nnx.merge(graph, from_tree(template, params))
    valid_BL = jnp.broadcast_to(batch["valid"][:, None], (B, L))
    context = Context.of(B, L, valid_BL=valid_BL, row_B=batch["row"], key=jax.random.key(1))
    return model(batch["image"], context, model.init_gate_state(), train)


def objective(params, batch):
    logits_BV, aux = apply(params, batch, True)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits_BV, batch["label"])
    loss = nats.mean() + 0.01 * aux.losses["load_balance"] + 0.001 * aux.losses["z"]
    return loss, (nats.mean(), (logits_BV, aux))


gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))
evaluate = jax.jit(functools.partial(apply, train=False))


@functools.cache
def initial():
    return to_tree(built()[1])


def test_patches_equal_those_of_a_loop():
    image_BHWC = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype(np.float32)
    expected = np.zeros((3, 9, 8), np.float32)
    for b in range(3):
        for i in range(3):
            for j in range(3):
                square = image_BHWC[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                expected[b, 3 * i + j] = square.reshape(-1)
    np.testing.assert_array_equal(patches(jnp.asarray(image_BHWC), 2), expected)


def test_an_image_that_is_no_multiple_of_the_patch_is_refused():
    uneven = dataclasses.replace(SETTINGS, patch_size=3)
    with pytest.raises(ValueError, match="image_size=8 is not a multiple of patch_size=3"):
        ViT(uneven, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_position_embeddings_distinguish_patches():
    """Without them attention, experts (dropless) and the mean would take patches in any order."""
    batch, order = image_batch(), np.random.default_rng(0).permutation(L)
    patch_BLP = np.asarray(patches(batch["image"], 2))[:, order]
    mixed = patch_BLP.reshape(B, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(B, 8, 8, 1)
    assert (mixed != np.asarray(batch["image"])).any(axis=(1, 2, 3)).all()
    blind = {**initial(), "position_embed_LD": jnp.zeros((L, D))}
    changes = []
    for params in (initial(), blind):
        first, second = (evaluate(params, {**batch, "image": x}) for x in (batch["image"], mixed))
        changes.append(float(np.abs(np.asarray(first[0] - second[0])).max()))
    assert changes[0] > 0.1
    assert changes[1] < 1e-5  # sums of 16 float32 in another order


def test_patches_attend_to_later_patches_and_to_no_other_image():
    batch = image_batch()
    changed = batch["image"].at[0, -1, -1].add(1.0)  # in the last patch of the first image
    first, second = (evaluate(initial(), {**batch, "image": x}) for x in (batch["image"], changed))
    routed = [np.asarray(aux.stats.entropy) for _, aux in (first, second)]
    assert (routed[0] != routed[1]).any()
    assert (first[0][0] != second[0][0]).all()
    np.testing.assert_array_equal(first[0][1:], second[0][1:])


def test_padding_images_are_neither_routed_nor_counted_and_change_nothing():
    batch = image_batch()
    valid = batch["valid"].at[-4:].set(False)
    clean_BV, clean = gradients(initial(), {**batch, "valid": valid})[0][1][1]
    dirty = {**batch, "valid": valid, "image": batch["image"].at[-4:].set(7.0)}
    other_BV, other = gradients(initial(), dirty)[0][1][1]
    assert int(clean.stats.tokens[0]) == (B - 4) * L
    np.testing.assert_array_equal(clean_BV[:-4], other_BV[:-4])
    jax.tree.map(np.testing.assert_array_equal, clean.stats, other.stats)
    jax.tree.map(np.testing.assert_array_equal, clean.losses, other.losses)
    assert np.isfinite(np.asarray(clean_BV)).all()


def test_every_parameter_has_a_gradient():
    (_, (_, (_, aux))), grads = gradients(initial(), image_batch())
    assert aux.stats.dropped_E.sum() > 0, "capacity should bind"
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(np.asarray(grad) != 0), path


def test_axis_letters_in_names_determine_how_parameters_are_sharded():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, jax.devices())
    specs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(initial()):
        specs[path[-1].key] = partition_spec(path, leaf.shape, mesh)
    P = jax.sharding.PartitionSpec
    assert specs["patch_embed_PD"] == specs["position_embed_LD"] == P(None, "fsdp")
    assert specs["head_DV"] == P("fsdp", None)
    assert specs["patch_bias_D"] == specs["head_bias_V"] == P()
    assert specs["up_EDF"] == P(None, "expert", "fsdp", "tensor")


@functools.cache
def alone():
    return gradients(initial(), image_batch())


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"data": 2, "expert": 2}, marks=pytest.mark.slow),
        {"fsdp": 2, "expert": 2, "tensor": 2},
        pytest.param({"expert": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"expert": 8}, marks=pytest.mark.slow),
    ],
    ids=meshes.name,
)
def test_every_mesh_gives_the_same_outputs(shape):
    (loss, (_, (logits_BV, aux))), grads = alone()
    with meshes.entered(shape):
        mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
        placed = jax.device_put(initial(), shardings(initial(), mesh))
        (other_loss, (_, (other_BV, other))), other_grads = gradients(placed, image_batch())
    # float32 sums of at most 64 products in another order, through two layers.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(other_loss, loss)
    close(other_BV, logits_BV)
    np.testing.assert_array_equal(other.stats.load_E, aux.stats.load_E)
    np.testing.assert_array_equal(other.stats.dropped_E, aux.stats.dropped_E)
    jax.tree.map(close, jax.device_get(other_grads), jax.device_get(grads))


def test_a_vit_with_experts_learns_in_20_steps():
    """The batch it is trained on, so that 20 steps suffice; chance is ln 10 = 2.30."""
    params, batch = initial(), image_batch()
    optimizer = optax.adam(LEARNING_RATE)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state, nats = optimizer.init(params), []
    for _ in range(20):
        (_, (loss, _)), grads = gradients(params, batch)
        params, state = update(params, state, grads)
        nats.append(float(loss))
    assert nats[0] > 2.0 and nats[-1] < 0.5
