"""``moejax inspect`` of a Hugging Face folder: the tensors' own numbers, under our names."""

import itertools
import json
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moejax.hf.imported import open_model
from moejax.hf.layout import plan
from moejax.hf.tensors import TensorFolder
from moejax.inspection import counts, weights
from moejax.inspection.folder import open_folder
from moejax.tasks.language.task import LanguageModel
from moejax.train.checkpoint.manifest import named_leaves
from tests.train import runs

E = 4
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "num_local_experts": E, "num_experts_per_tok": 2,
    },
    "deepseek": {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3,
        "moe_intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "n_routed_experts": E, "n_shared_experts": 2,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "norm_topk_prob": False, "scoring_func": "softmax",
    },
    "gpt_oss": {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5,
        "num_local_experts": E, "num_experts_per_tok": 2, "sliding_window": 4,
    },
}  # fmt: skip


def written(folder, family):
    """A folder with drawn weights in bfloat16, by name."""
    folder.mkdir()
    keys = {"model_type": family, "tie_word_embeddings": False, **CONFIGS[family]}
    (folder / "config.json").write_text(json.dumps(keys))
    model = open_model(folder)
    task = LanguageModel.from_config(model.config, keys["vocab_size"])
    params = named_leaves({"params": jax.eval_shape(lambda: task.init(jax.random.key(0)))})
    copies = plan(model.family, task.model, params).tensors()
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=parts[0].shape).astype(ml_dtypes.bfloat16)
        for name, parts in copies.items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return {name: x.astype(np.float32) for name, x in tensors.items()}


def experts_of(tensors, family, layer):
    """Each expert's weights as one vector, from their tensors."""
    at = f"model.layers.{layer}."
    if family == "gpt_oss":
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        return [
            np.concatenate([tensors[f"{at}mlp.experts.{name}"][e].ravel() for name in names])
            for e in range(E)
        ]
    block, names = {
        "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
        "deepseek": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    }[family]
    return [
        np.concatenate([tensors[f"{at}{block}.experts.{e}.{n}.weight"].ravel() for n in names])
        for e in range(E)
    ]


ROUTERS = {"mixtral": "block_sparse_moe.gate", "deepseek": "mlp.gate", "gpt_oss": "mlp.router"}
SPARSE = {"mixtral": [0, 1, 2], "deepseek": [1, 2], "gpt_oss": [0, 1]}


@pytest.mark.parametrize("block_bytes", [500, 2**26])
@pytest.mark.parametrize("family", CONFIGS)
def test_norms_and_cosines_are_those_of_their_tensors(tmp_path, family, block_bytes, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    tensors = written(tmp_path / "model", family)
    with TensorFolder(tmp_path / "model") as opened:
        model = open_folder(tmp_path / "model", opened)
        norms, similar = weights.router_norms(model), dict(weights.similarities(model))
    assert list(norms) == list(similar) == SPARSE[family]
    for layer, own in similar.items():
        rows_ED = tensors[f"model.layers.{layer}.{ROUTERS[family]}.weight"]
        np.testing.assert_allclose(norms[layer], np.linalg.norm(rows_ED, axis=1), rtol=1e-6)
        unit = [v / np.linalg.norm(v) for v in experts_of(tensors, family, layer)]
        pairs = {(i, j): unit[i] @ unit[j] for i, j in itertools.combinations(range(E), 2)}
        # float32 products of some hundred numbers
        assert own.mean == pytest.approx(np.mean(list(pairs.values())), abs=1e-6)
        assert own.pair == max(pairs, key=pairs.__getitem__)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_counts_are_those_of_their_tensors(tmp_path, family):
    tensors = written(tmp_path / "model", family)
    with TensorFolder(tmp_path / "model") as opened:
        model = open_folder(tmp_path / "model", opened)
    found = counts.by_part(model)
    assert counts.total(found).total == sum(x.size for x in tensors.values())
    routed = sum(x.size for name, x in tensors.items() if ".experts." in name)
    assert found["experts"] == (routed, routed // 2)
    assert {x.dtype for x in model.arrays} == {"BF16"}
    assert found["embedding"].total == found["head"].total == 48 * 16
    assert ("shared experts" in found) == ("dense FFN" in found) == (family == "deepseek")


def test_slices_are_those_of_the_whole_arrays(tmp_path):
    written(tmp_path / "model", "gpt_oss")
    with TensorFolder(tmp_path / "model") as opened:
        for x in open_folder(tmp_path / "model", opened).arrays:
            whole = x.read(())
            assert whole.shape == x.shape
            if len(x.shape) > 2:
                for index in ((0, slice(1, 3)), (slice(None), slice(0, 2)), (0, 1)):
                    np.testing.assert_array_equal(x.read(index), whole[index], x.path)


def test_the_command_reads_a_folder(tmp_path):
    written(tmp_path / "model", "mixtral")
    ended = runs.call(["inspect", str(tmp_path / "model"), "--json"])
    assert ended.status == 0, ended.err
    row = json.loads(ended.out)
    assert row["family"] == "mixtral" and row["experts_per_token"] == 2
    assert list(row["expert_similarity"]) == ["0", "1", "2"]
    assert row["arrays"]["periods/blocks/0/ffn/up_EDF"] == {
        "part": "experts", "shape": [3, E, 16, 12], "dtype": "BF16",
    }  # fmt: skip


def test_mistakes_are_one_line(tmp_path):
    folder = tmp_path / "model"
    written(folder, "mixtral")
    command = ["inspect", str(folder)]
    runs.refused([*command, "--step=0"], "--step=0", "is a Hugging Face model")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "num_hidden_layers": 4}))
    runs.refused(command, "has no tensor 'model.layers.3.")
    (folder / "config.json").write_text(json.dumps({**keys, "model_type": "mystery"}))
    runs.refused(command, "model_type='mystery' is not supported")
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    runs.refused(command, "pytorch_model.bin is a pickle")
