"""The image-text tower: its loss against loops, what a pair depends on, equality on every mesh."""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import config as configs
from moejax.config import validate
from moejax.config.overrides import apply_overrides
from moejax.contrib.multimodal.model import LARGEST_SCALE
from moejax.contrib.multimodal.source import CLASSES, PairSource, encode, prompts
from moejax.contrib.multimodal.task import Embeddings, Multimodal, build, contrastive, retrieved
from moejax.errors import UserError
from moejax.train.metrics.rows import routing
from moejax.train.step import split_batch
from moejax.types import LayerAux
from tests import meshes

B, KEY = 16, 9
TINY = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "moe.num_experts": 4,
    "moe.d_ff": 8,
    "moe.group": "2",
    "task.patch_size": 4,
    "task.embed_dim": 8,
    "task.image_experts": 4.0,
    "train.batch_size": B,
}


def config_with(**changes):
    config = configs.default("multimodal")
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    given = {"moe.gate.name": "switch", **TINY, **changes}
    apply_overrides(config, [f"{name}={value}" for name, value in given.items()])
    return config


@functools.cache
def built():
    task, source = build(config_with())
    assert isinstance(task, Multimodal) and isinstance(source, PairSource)
    return task, source


@functools.cache
def params():
    """Routers are drawn large: decided, and far from ties."""
    drawn = built()[0].init(jax.random.key(3))
    router = built()[0].expert_layers(drawn)["router"]
    router["router_DE"] = jax.random.normal(jax.random.key(4), router["router_DE"].shape)
    return drawn


def batch(padded=4):
    """Pairs of a training step, of which the last are not valid."""
    found = built()[1].train_batch(2)
    found["valid"] = np.arange(B) < B - padded
    return {name: jnp.asarray(x) for name, x in found.items()}


def loss_and_totals(params, batch, train=True):
    task, _ = built()
    totals = task.forward(params, (), batch, jnp.int32(0), jax.random.key(KEY), train)
    return task.objective(totals, totals.items), totals


@functools.cache
def stepped(mesh=()):
    """The jitted loss, totals and gradients in training on a mesh, of (params, batch)."""
    del mesh  # a program each
    return jax.jit(jax.value_and_grad(loss_and_totals, has_aux=True))


@functools.cache
def evaluated(mesh=()):
    del mesh
    return jax.jit(lambda params, batch: loss_and_totals(params, batch, train=False)[1])


# The loss.


def looped(logits, label, valid):
    """From the definition, a pair at a time."""
    loss, rows = np.zeros(len(label)), np.flatnonzero(valid)
    for i in rows:
        for way in (logits, logits.T):
            log_p = scipy.special.log_softmax(way[i, rows].astype(np.float64))
            own = [log_p[at] for at, j in enumerate(rows) if label[j] == label[i]]
            loss[i] -= np.mean(own) / 2
    return loss


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 8), st.integers(1, 12))
def test_the_loss_equals_a_loop_over_the_valid_pairs(seed, pairs, classes):
    rng = np.random.default_rng(seed)
    logits = (10 * rng.normal(size=(8, 8))).astype(np.float32)
    label = rng.integers(0, classes, 8).astype(np.int32)
    valid = rng.permutation(np.arange(8) < pairs)
    # Whatever padding holds, as long as it is a number: the model's own is zeros.
    got = jax.jit(contrastive)(jnp.asarray(logits), jnp.asarray(label), jnp.asarray(valid))
    # float32 logarithms of sums of 8
    np.testing.assert_allclose(got, looped(logits, label, valid), rtol=1e-5, atol=1e-5)


def test_with_distinct_labels_the_loss_is_the_cross_entropy_of_the_diagonal():
    logits, label = jax.random.normal(jax.random.key(0), (8, 8)), jnp.arange(8)
    every = jnp.ones(8, bool)
    rows, columns = (scipy.special.log_softmax(np.asarray(x), axis=1) for x in (logits, logits.T))
    clip = -(np.diag(rows).mean() + np.diag(columns).mean()) / 2
    step = jax.jit(contrastive)
    np.testing.assert_allclose(step(logits, label, every).mean(), clip, rtol=1e-5)
    equal = step(jnp.zeros((8, 8)), label % 3, every)
    np.testing.assert_allclose(equal, math.log(8), rtol=1e-6)


def test_the_loss_is_minimal_at_equal_similarity_of_the_captions_of_a_digit():
    """Then it is the entropy of a uniform choice among the digit's pairs."""
    label = jnp.asarray([0, 0, 0, 1, 1, 2])
    logits = jnp.where(label[:, None] == label, 50.0, 0.0)

    def total(logits):
        loss = contrastive(logits, label, jnp.ones(6, bool))
        return loss.sum(), loss

    gradient, loss = jax.jit(jax.grad(total, has_aux=True))(logits)
    np.testing.assert_allclose(loss, np.log([3, 3, 3, 2, 2, 1]), atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_the_baseline_is_the_loss_at_equal_similarities_with_a_short_last_batch():
    _, whole = built()
    step = jax.jit(contrastive)
    for rows, last in ((40, 8), (48, 16), (5, 5)):
        own = dataclasses.replace(whole, eval_rows=rows)
        batches = own.eval_batches(B, rows)
        assert batches[-1]["valid"].sum() == last
        losses = [step(jnp.zeros((B, B)), x["label"], x["valid"]).sum() for x in batches]
        # float32 sums of 16 logarithms
        np.testing.assert_allclose(own.baselines()["uniform"], sum(losses) / rows, rtol=1e-5)


def test_retrieval_counts_any_caption_of_the_digit_but_no_padding():
    logits = jnp.asarray([[1.0, 3.0, 9.0], [0.0, 1.0, 9.0], [0.0, 0.0, 0.0]])
    valid = jnp.asarray([True, True, False])
    same, other = jnp.asarray([5, 5, 1]), jnp.asarray([5, 6, 5])
    assert retrieved(logits, same, valid)[:2].tolist() == [True, True]
    assert retrieved(logits, other, valid)[:2].tolist() == [False, True]


@dataclasses.dataclass(frozen=True)
class Fixed(Multimodal):
    """Says the embeddings that it is given in the place of parameters."""

    def apply(
        self, params: Any, gate_state: Any, batch: Any, step: Any, key: Any, train: bool, tap=None
    ) -> tuple[Any, LayerAux]:
        return params, LayerAux(mean_square=jnp.ones(1))


def test_captions_are_retrieved_by_images_and_images_by_captions():
    """Similarities 0.9 and 0.8, 0.1 and 0.5: both captions are most like the first image."""
    task = Fixed(SimpleNamespace(length=2, patches=2, caption_length=2), (), 0.0, ())
    text_BZ = jnp.asarray([[0.9, 0.1], [0.8, 0.5]])
    batch = {
        "label": jnp.asarray([3, 4]),
        "valid": jnp.ones(2, bool),
        "text_valid": jnp.ones((2, 2), bool),
    }
    said: Any = Embeddings(jnp.eye(2), text_BZ, jnp.float32(1.0))
    step, key = jnp.int32(0), jax.random.key(0)
    totals = jax.jit(lambda said: task.forward(said, (), batch, step, key, train=True))(said)
    assert totals.metrics == {"image_to_text": 2, "text_to_image": 1}
    # -log softmax of the diagonal, by rows and by columns, halved.
    rows = math.log(1 + math.exp(-0.1)) + math.log(1 + math.exp(-0.4))
    columns = math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(0.3))
    np.testing.assert_allclose(totals.loss, (rows + columns) / 2, rtol=1e-6)


# The model.


@pytest.mark.slow
def test_every_parameter_has_a_gradient():
    """Temperature, both projections, router, embeddings of bytes that occur: all of them."""
    _, grads = stepped()(params(), batch())
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert {"logit_scale", "image_head_DZ", "text_head_DZ"} <= {
        str(getattr(path[0], "key", "")) for path, _ in leaves
    }
    assert any("router" in jax.tree_util.keystr(path) for path, _ in leaves)
    for path, grad in leaves:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, path


@pytest.mark.slow
def test_padding_may_hold_anything():
    clean = batch()
    valid = clean["valid"]
    poisoned = {
        **clean,
        "image": jnp.where(valid[:, None, None, None], clean["image"], jnp.nan),
        "text": jnp.where(clean["text_valid"] & valid[:, None], clean["text"], 300),
        "text_valid": clean["text_valid"] | ~valid[:, None],
        "label": jnp.where(valid, clean["label"], clean["label"][0]),
    }
    got, wanted = stepped()(params(), poisoned), stepped()(params(), clean)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert got[0][1].items == valid.sum() < B


@functools.cache
def embedded():
    """The jitted embeddings of a batch in evaluation, with what a layer saw."""
    task, _ = built()

    def tap(x_BLD, info):
        return {"expert": info.routing.expert_GTK.reshape(*x_BLD.shape[:2], -1)}

    return jax.jit(
        lambda params, batch: task.apply(
            params, (), batch, jnp.int32(0), jax.random.key(KEY), False, tap
        )
    )


def test_images_and_captions_do_not_affect_each_other_and_vectors_have_length_1():
    first, other = batch(0), batch(0)
    other["text"] = jnp.roll(other["text"], 1, axis=0)
    other["text_valid"] = jnp.roll(other["text_valid"], 1, axis=0)
    before, after = (embedded()(params(), x)[0] for x in (first, other))
    np.testing.assert_array_equal(before.image_BZ, after.image_BZ)
    # Rows of a sorted matmul move with other rows; their sums may be blocked otherwise.
    np.testing.assert_allclose(jnp.roll(before.text_BZ, 1, axis=0), after.text_BZ, atol=1e-5)
    assert np.abs(before.text_BZ - after.text_BZ).max() > 1e-3
    for x in before[:2]:
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)


def test_tapped_arrays_are_laid_out_by_pair_with_the_image_first():
    task, source = built()
    _, aux = embedded()(params(), batch(0))
    expert = aux.taps["expert"]
    length = task.units.tokens_per_row
    assert expert.shape == (2, B, length, 1)
    valid = source.probe_arrays(jax.device_get(batch(0)), B)["valid"]
    own = np.asarray(expert)[..., 0]
    for task_id, half in enumerate((slice(0, length // 2), slice(length // 2, None))):
        for layer in range(2):
            counts = np.bincount(own[layer, :, half][valid[:, half]], minlength=4)
            np.testing.assert_array_equal(counts, aux.stats.load_ME[layer, task_id])


@pytest.mark.slow
def test_zero_shot_accuracy_uses_the_prompts_as_captions():
    _, source = built()
    text, valid = encode([*prompts(), *prompts()[: B - 10]], source.caption_length)
    held_out = {name: jnp.asarray(x) for name, x in source.eval_batches(B, B)[0].items()}
    said = embedded()(params(), {**held_out, "text": text, "text_valid": valid})[0]
    predicted = np.argmax(said.image_BZ @ said.text_BZ[: len(CLASSES)].T, axis=1)
    hits = (predicted == np.asarray(held_out["label"])).sum()
    totals = evaluated()(params(), held_out)
    assert totals.metrics["accuracy"] == hits
    _, in_training = jax.eval_shape(loss_and_totals, params(), held_out)
    assert "accuracy" not in in_training.metrics


def test_the_temperature_starts_at_clips_value_and_its_gradient_passes_the_bound():
    task, _ = built()

    def scale(raw):
        return task.built({**params(), "logit_scale": raw}).scale()

    start = float(task.init(jax.random.key(0))["logit_scale"])
    np.testing.assert_allclose(math.exp(start), 1 / 0.07, rtol=1e-6)
    for raw, wanted in ((start, math.exp(start)), (9.0, LARGEST_SCALE)):
        value, slope = jax.value_and_grad(scale)(jnp.float32(raw))
        np.testing.assert_allclose([value, slope], [wanted, wanted], rtol=1e-5)


# Rows, meshes, mistakes.


def test_rows_report_the_sharing_of_experts_by_modalities():
    totals = jax.device_get(stepped()(params(), batch())[0][1])
    row, load = routing(totals.stats), np.asarray(totals.stats.load_ME)
    np.testing.assert_array_equal(load.sum(axis=1), row["moe/load"])
    assert row["moe/load_by_task"] == load.tolist()
    joint = load / load.sum(axis=(1, 2), keepdims=True)
    experts = [[scipy.stats.entropy(x) for x in layer] for layer in joint]
    np.testing.assert_allclose(row["moe/experts_of_task"], np.exp(experts).mean(axis=0))
    expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=2, keepdims=True)
    told = [
        scipy.stats.entropy(p.ravel(), q.ravel()) / scipy.stats.entropy(p.sum(axis=1))
        for p, q in zip(joint, expected, strict=True)
    ]
    np.testing.assert_allclose(row["moe/task_split"], np.mean(told))
    apart = dataclasses.replace(totals.stats, load_ME=np.array([[[4, 4, 0, 0], [0, 0, 8, 0]]]))
    assert routing(apart)["moe/task_split"] == pytest.approx(1.0)
    assert routing(apart)["moe/experts_of_task"] == pytest.approx([2.0, 1.0])
    alike = dataclasses.replace(totals.stats, load_ME=np.array([[[1, 2, 3, 0], [2, 4, 6, 0]]]))
    assert routing(alike)["moe/task_split"] == pytest.approx(0.0, abs=1e-12)


def placed():
    """The batch, its pairs split over the mesh that was entered."""
    spec = jax.sharding.PartitionSpec(("data", "fsdp", "expert"))
    by_row = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.device_put(jax.device_get(batch()), by_row)


def check_same(other, totals):
    """float32 sums over the batch in another order; counts and hits exactly."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, other.auxiliary, jax.device_get(totals.auxiliary))
    close(other.loss, totals.loss)
    jax.tree.map(np.testing.assert_array_equal, other.metrics, jax.device_get(totals.metrics))
    for field in ("load_E", "load_ME", "dropped_E"):
        np.testing.assert_array_equal(getattr(other.stats, field), getattr(totals.stats, field))
    assert totals.auxiliary["global_entropy_0"] > 0


MESHES = [{"expert": 2}, {"data": 2, "expert": 2}, {"data": 8}, {"data": 2, "expert": 4}]


@pytest.mark.slow
def test_a_sharded_batch_has_the_totals_of_the_whole_batch():
    """Similarities, soft targets, entropies and prompts are the same wherever pairs lie."""
    shape = MESHES[-1]
    with meshes.entered(shape):
        other = jax.device_get(evaluated(tuple(shape.items()))(params(), placed()))
    assert "accuracy" in other.metrics
    check_same(other, evaluated()(params(), batch()))


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=meshes.name)
def test_a_sharded_batch_trains_as_the_whole_batch(shape):
    (loss, totals), grads = stepped()(params(), batch())
    with meshes.entered(shape):
        step = stepped(tuple(shape.items()))
        (other_loss, other), other_grads = jax.device_get(step(params(), placed()))
    check_same(other, totals)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(other_loss, loss)
    jax.tree.map(close, other_grads, jax.device_get(grads))
    assert totals.stats.dropped_E.sum() > 0


@pytest.mark.parametrize(
    "change",
    [
        "train__batch_size=4",
        "train__batch_size=12",
        "train__batch_size=64 moe__group=128",
        "train__batch_size=32 mesh__data=8",
        "train__batch_size=3 moe__group=batch moe__transport=dropless",
    ],
)
def test_a_group_counts_two_sequences_for_each_pair(change):
    """Each would be refused if pairs were counted."""
    validate(config_with(**{"moe__group": "8", **dict(one.split("=") for one in change.split())}))


def test_a_batch_smaller_than_a_group_is_one_group():
    found = {"valid": jnp.arange(4), "image": jnp.ones((4, 2))}
    parts = split_batch(found, 1, 8)
    jax.tree.map(lambda x, whole: np.testing.assert_array_equal(x[0], whole), parts, found)
    assert parts["image"].shape == (1, 4, 2)


REFUSED = {
    "train__batch_size=6 moe__group=8": ["x 2 = 12 sequences", "moe.group=8", "batch_size=8"],
    "train__batch_size=4 moe__group=3": ["x 2 = 8 sequences", "moe.group=3", "batch_size=6"],
    "train__batch_size=24 moe__group=8 mesh__data=4": ["6 groups", "48 sequences", "batch_size=32"],
    "train__grad_accum=2 moe__balance_scope=sequence": [
        "train.grad_accum=2",
        "micro-batch",
        "train.grad_accum=1",
    ],
    "task__patch_size=3": ["task.patch_size=3", "8 x 8", "1, 2, 4, 8"],
    "task__image_experts=5": ["task.image_experts=5", "moe.num_experts=4"],
    "task__text_experts=4.5": ["task.text_experts=4.5", "moe.num_experts=4"],
    "task__text_experts=0.5": ["task.text_experts=0.5", ">= 1"],
    "task__embed_dim=0": ["task.embed_dim=0", ">= 1"],
    "moe__losses__global_entropy_1=-1": ["moe.losses.global_entropy_1=-1.0", ">= 0"],
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_mistake_is_reported_in_one_line_with_field_and_remedy(change):
    changes = dict(one.split("=") for one in change.split())
    with pytest.raises(UserError) as caught:
        config = config_with(**changes)
        validate(config)
        build(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in REFUSED[change]:
        assert part in message


def test_a_recorded_routing_is_refused():
    with pytest.raises(UserError, match=r"moe.gate.name=replay .* two sequences"):
        build(config_with(moe__gate__name="replay", moe__gate__path="a.npz"))
