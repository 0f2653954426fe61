"""``moejax inspect`` of a workdir: counts, norms and cosines, with little in memory."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moejax.config import load
from moejax.inspection import counts, weights
from moejax.inspection.report import describe
from moejax.inspection.stored import Model, Stored, by_layer, part
from moejax.inspection.workdir import open_workdir
from moejax.tasks.language.task import LanguageModel
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.checkpoint.restore import Part
from moejax.train.cost import budget
from moejax.train.parameters import EXPERT_WEIGHTS
from moejax.types import Gate
from tests.train import runs

WORKDIR = Path(runs.__file__).parent / "data" / "schema-1" / "workdir"
STEP = 6


@pytest.fixture
def workdir(tmp_path):
    """A run of an older version, in a folder that a test may damage."""
    return Path(shutil.copytree(WORKDIR, tmp_path / "run"))


def in_memory(*fields, seed=0):
    """The model of a config with drawn parameters, and the task."""
    flags = [f"--config.{field}" for field in ("model.d_model=16", "model.num_layers=4", *fields)]
    config = load("configs/lm.py:size=debug,experts=4", flags).config
    task = LanguageModel.from_config(config, 64)
    params = jax.jit(lambda: task.init(jax.random.key(seed)))()
    gate: Gate = task.model.gate
    arrays = []
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = np.asarray(x)
        arrays.append(Stored(name, values.shape, str(x.dtype), lambda i, v=values: v[i]))
    heads = config.model.moa_k / config.model.moa_experts if config.model.moa_experts else 1.0
    k = gate.columns(4) if task.model.every else 0
    return Model("drawn", arrays, k, 4 if k else 0, heads, {}), params, task


MODELS = {
    "mixture": ("moe.gate.name=top_k",),
    "dense": ("moe.every=0",),
    "dense below, shared, untied": (
        "moe.gate.name=loss_free", "moe.first_dense=1", "moe.every=3", "moe.shared_experts=1",
        "moe.shared_gate=True", "model.tie_embeddings=False", "moe.expert_bias=True",
        "model.qk_norm=head", "model.norm_place=both",
    ),
    "dense between": ("moe.dense_layers=1,2",),
    "heads as experts": ("model.moa_experts=4", "model.moa_k=2", "model.num_kv_heads=1"),
}  # fmt: skip


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_the_parts_add_up_to_the_counts_of_the_run(fields):
    model, params, task = in_memory(*fields)
    found = counts.by_part(model)
    assert "other" not in found and ("experts" in found) == bool(model.k)
    total = counts.total(found)
    assert total.total == sum(x.size for x in jax.tree.leaves(params))

    run: Any = SimpleNamespace(task=task, abstract_state=SimpleNamespace(params=params))
    assert total.active == budget.active_parameters(run)


def test_every_parameter_is_in_its_part():
    model, *_ = in_memory(*MODELS["dense below, shared, untied"])
    parts = {x.path: part(x) for x in model.arrays}
    assert parts["first/0/ffn/up_DF"] == parts["periods/blocks/0/ffn/up_DF"] == "dense FFN"
    block = "periods/blocks/2/ffn"
    assert parts[f"{block}/up_EDF"] == parts[f"{block}/down_bias_ED"] == "experts"
    assert parts[f"{block}/shared/up_DF"] == "shared experts"
    assert parts[f"{block}/router/router_DE"] == parts[f"{block}/shared_gate_D"] == "router"
    assert (parts["embed_VD"], parts["head_DV"]) == ("embedding", "head")
    assert parts["final_norm/scale_D"] == "norms"
    assert set(parts.values()) >= {"attention"}


def test_layers_are_numbered_as_in_the_model():
    model, *_ = in_memory("moe.first_dense=1", "moe.every=3", "model.num_layers=7")
    layers = by_layer(model.arrays)
    assert list(layers) == list(range(7))
    assert [i for i, own in layers.items() if "ffn/router/router_DE" in own] == [3, 6]
    (stacked,) = (x for x in model.arrays if x.name == "router_DE")
    np.testing.assert_array_equal(
        layers[6]["ffn/router/router_DE"].read(), stacked.read((slice(None),))[1]
    )


def cosines(experts):
    """All pairs of experts, [E, ...] per matrix, by definition."""
    flat = [np.concatenate([np.ravel(w[e]) for w in experts]) for e in range(len(experts[0]))]
    return {
        (i, j): float(flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]))
        for i, j in itertools.combinations(range(len(flat)), 2)
    }


@pytest.mark.parametrize("block_bytes", [1, 2000, 2**26])
def test_norms_and_cosines_are_those_of_the_whole_weights(block_bytes, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    model, *_ = in_memory("moe.dense_layers=1", "moe.expert_bias=True")
    layers = by_layer(model.arrays)
    norms, similar = weights.router_norms(model), dict(weights.similarities(model))
    assert list(norms) == list(similar) == [0, 2, 3]
    for layer, own in similar.items():
        router_DE = layers[layer]["ffn/router/router_DE"].read()
        wanted = [np.sqrt(np.sum(router_DE[:, e] ** 2)) for e in range(4)]
        np.testing.assert_allclose(norms[layer], wanted, rtol=1e-6)
        known = [layers[layer].get(f"ffn/{name}") for name in EXPERT_WEIGHTS]
        pairs = cosines([x.read() for x in known if x is not None])
        # float32 products of some thousand numbers
        assert own.mean == pytest.approx(np.mean(list(pairs.values())), abs=1e-6)
        assert own.pair == max(pairs, key=pairs.__getitem__)
        assert own.most == pytest.approx(max(pairs.values()), abs=1e-6)


def test_no_read_is_larger_than_a_block(monkeypatch):
    model, *_ = in_memory("moe.gate.name=top_k")
    sizes = []

    def watched(x):
        def read(index):
            values = x.read(index)
            if x.name in EXPERT_WEIGHTS:
                sizes.append(values.nbytes)
            return values

        return Stored(x.path, x.shape, x.dtype, read)

    monkeypatch.setattr(weights, "BLOCK_BYTES", 2048)
    whole = sum(4 * x.size for x in model.arrays if x.name in EXPERT_WEIGHTS)
    dict(weights.similarities(model._replace(arrays=[watched(x) for x in model.arrays])))
    assert max(sizes) <= 2048 and sum(sizes) == whole > 10 * 2048


def test_equal_experts_have_cosine_1_and_an_expert_of_zeros_none():
    ones = np.ones((1, 3, 4, 2), np.float32)
    ones[0, 2] = 0
    model = Model(
        "", [Stored("periods/blocks/0/ffn/up_EDF", ones.shape, "float32", lambda i: ones[i])],
        1, 3, 1.0, {},
    )  # fmt: skip
    ((_, found),) = weights.similarities(model)
    assert found.pair == (0, 1) and found.most == pytest.approx(1.0)
    assert found.mean == pytest.approx(1 / 3)


# ---------------------------------------------------------------- a workdir


def test_a_checkpoint_is_described_as_restored(workdir):
    model = open_workdir(workdir)
    config = load(str(workdir / "config.json"), []).config
    task = LanguageModel.from_config(config, 256)
    wanted = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(wanted, step=STEP, part=Part("params/"))
    assert restored is not None
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(restored.state)
    }
    assert {x.path: (x.shape, x.dtype) for x in model.arrays} == {
        name: (x.shape, str(x.dtype)) for name, x in named.items()
    }
    for x in model.arrays:
        np.testing.assert_array_equal(x.read(()), named[x.path])
        if x.nodes[0] == "periods" and len(x.shape) > 2:
            index = (1, slice(0, 2))
            np.testing.assert_array_equal(x.read(index), named[x.path][index])


def test_the_command_prints_text_and_json(workdir):
    ended = runs.call(["inspect", str(workdir), "--arrays"])
    assert ended.status == 0, ended.err
    assert "2 of 4 per token and layer" in ended.out and "3.43k" in ended.out
    assert "periods/blocks/0/ffn/up_EDF" in ended.out and "cosine" in ended.out
    ended = runs.call(["inspect", str(workdir), "--json"])
    row = json.loads(ended.out)
    assert row["parameters"] == {"total": 3432, "active": 3048} and row["step"] == STEP
    assert row["arrays"]["embed_VD"] == {
        "part": "embedding", "shape": [256, 8], "dtype": "float32",
    }  # fmt: skip
    assert list(row["router_norms"]) == ["0", "1"] and len(row["router_norms"]["0"]) == 4
    assert set(row["expert_similarity"]["1"]) == {"mean", "most", "pair"}


def test_without_weights_nothing_but_the_description_is_read(workdir):
    runs.call(["inspect", str(workdir)])
    shutil.rmtree(workdir / "checkpoints" / str(STEP) / "state")
    found = describe(open_workdir(workdir), weights_too=False)
    assert counts.total(found.parts).total == 3432 and not found.router_norms
    assert "router rows" not in "\n".join(found.lines())
    runs.refused(["inspect", str(workdir)], "array params/", "cannot be read", "--step")


def test_mistakes_are_one_line(workdir, tmp_path):
    runs.call(["inspect", str(workdir)])  # says once which fields an older run lacks
    runs.refused(["inspect", str(tmp_path / "no")], "is not a folder")
    runs.refused(["inspect", str(tmp_path)], "config.json does not exist")
    runs.refused(
        ["inspect", str(workdir), "--step=5"], "no checkpoint of step 5 in", "those there: 6"
    )
    runs.refused(["inspect", str(workdir), "--step=-1"], "--step=-1 must be")
    metadata = workdir / "checkpoints" / str(STEP) / "meta" / "metadata"
    metadata.write_text(metadata.read_text().replace("[256, 8]", "[256, 9]", 1).replace(
        "[256,8]", "[256,9]", 1))  # fmt: skip
    runs.refused(["inspect", str(workdir)], "metadata cannot be read", "digest")
    shutil.rmtree(workdir / "checkpoints")
    runs.refused(["inspect", str(workdir)], "no checkpoint in", "train first")
