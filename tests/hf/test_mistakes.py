"""Mistakes in conversion: one line that names the file, tensor or field, and nothing left."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from moejax import cli
from tests.hf import folders

NAME = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def said(capsys, *argv: str) -> str:
    """The one line of a command that fails by a mistake of the user's."""
    capsys.readouterr()
    assert cli.main(["convert", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def refused(capsys, tmp_path: Path, folder: Path, *flags: str) -> str:
    """The line for a folder that cannot be brought in. Nothing appears beside it."""
    before = sorted(tmp_path.rglob("*"))
    line = said(capsys, f"--from-hf={folder}", f"--workdir={tmp_path / 'run'}", *flags)
    assert sorted(tmp_path.rglob("*")) == before
    return line


def comes_in(folder: Path, workdir: Path) -> None:
    """With a text of its own: how repetitive the default text is takes a second to measure."""
    text = workdir.with_name("text.txt")
    text.write_text("".join(f"line {i} of a text {i * i}\n" for i in range(200)))
    flags = [f"--config.data.path={text}", "--config.train.eval_rows=8"]
    flags += ["--config.train.seq_len=16"]
    assert cli.main(["convert", f"--from-hf={folder}", f"--workdir={workdir}", *flags]) == 0


def without(name: str):
    values = folders.tensors()
    del values[name]
    return values


def test_a_folder_written_by_hand_comes_in(tmp_path, capsys):
    for at, folder in (
        ("one", folders.write(tmp_path / "one")),
        ("two", folders.write_sharded(tmp_path / "two")),
    ):
        comes_in(folder, tmp_path / f"{at}-run")
        assert "mixtral" in capsys.readouterr().out
        assert (tmp_path / f"{at}-run" / "config.json").is_file()


TENSORS = {
    "missing": (
        lambda: without(NAME),
        [NAME, "config.json asks for", "download the model again"],
    ),
    "left over": (
        lambda: {**folders.tensors(), "model.layers.0.self_attn.q_proj.bias": np.zeros(16)},
        ["model.safetensors", "model.layers.0.self_attn.q_proj.bias", "mixtral"],
    ),
    "of another shape": (
        lambda: {**folders.tensors(), NAME: np.zeros((13, 16), np.float32)},
        ["model.safetensors", NAME, "[13, 16]", "[12, 16]"],
    ),
    "whole numbers": (
        lambda: {**folders.tensors(), NAME: np.zeros((12, 16), np.int8)},
        ["model.safetensors", NAME, "I8", "bfloat16"],
    ),
}


@pytest.mark.parametrize("mistake", TENSORS)
def test_tensors_that_do_not_fit_the_config_are_named(mistake, tmp_path, capsys):
    values, words = TENSORS[mistake]
    line = refused(capsys, tmp_path, folders.write(tmp_path / "hf", values()))
    assert all(word in line for word in words), line


KEYS = {
    "model_type='mamba' is not supported": {"model_type": "mamba"},
    "did you mean 'mixtral'?": {"model_type": "mixtrall"},
    "model_type=None is not supported": {"model_type": ...},
    "hidden_act='gelu' is not supported; moejax knows 'silu'": {"hidden_act": "gelu"},
    "rope_type='dynamic' is not supported": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "lacks num_local_experts": {"num_local_experts": ...},
    "lacks hidden_size": {"hidden_size": ...},
    "lacks num_attention_heads": {"num_attention_heads": ...},
    "hidden_size='wide' must be a": {"hidden_size": "wide"},
    "num_hidden_layers='2' must be a": {"num_hidden_layers": "2"},
    "rms_norm_eps=None must be a number": {"rms_norm_eps": None},
    "num_attention_heads=0": {"num_attention_heads": 0},
    "moe.gate.k=5 must lie between 1 and num_experts=4": {"num_experts_per_tok": 5},
    "sliding_window='wide'": {"sliding_window": "wide"},
    "tie_word_embeddings='no'": {"tie_word_embeddings": "no"},
    "rope_theta": {"rope_theta": "big"},
    "rope_scaling": {"rope_scaling": "linear"},
    "rope_scaling lacks low_freq_factor": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "num_experts_per_tok='two' must be a": {"num_experts_per_tok": "two"},
    "max_position_embeddings='long'": {"max_position_embeddings": "long"},
}


@pytest.mark.parametrize("words", KEYS)
def test_a_key_that_is_unknown_missing_or_no_value_is_named(words, tmp_path, capsys):
    line = refused(capsys, tmp_path, folders.write(tmp_path / "hf", **KEYS[words]))
    assert words in line, line
    assert "config.json" in line, line


def test_clipped_queries_are_refused(tmp_path, capsys):
    keys = {"model_type": "olmoe", "num_experts": 4, "clip_qkv": 8.0}
    line = refused(capsys, tmp_path, folders.write(tmp_path / "hf", **keys))
    assert "clip_qkv=8.0 is not supported" in line


def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path, capsys):
    folder = folders.write(tmp_path / "hf")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    assert "hf/model.safetensors is damaged or cut off" in refused(capsys, tmp_path, folder)
    file.write_bytes(file.read_bytes()[:5])
    assert "hf/model.safetensors is damaged or cut off" in refused(capsys, tmp_path, folder)
    file.unlink()
    assert "has neither model.safetensors nor" in refused(capsys, tmp_path, folder)
    assert "is not a folder" in refused(capsys, tmp_path, tmp_path / "nowhere")
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refused(capsys, tmp_path, folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(capsys, tmp_path, folder)
    (folder / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refused(capsys, tmp_path, folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused(file, tmp_path, capsys):
    folder = folders.write(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / file)
    line = refused(capsys, tmp_path, folder)
    assert f"{file} is a pickle" in line and "save_pretrained" in line


def test_an_index_that_does_not_fit_its_files_is_named(tmp_path, capsys):
    gone = folders.write_sharded(tmp_path / "gone", **{NAME: "c.safetensors"})
    line = refused(capsys, tmp_path, gone)
    assert "c.safetensors is missing" in line and "index.json" in line
    file = json.loads((gone / "model.safetensors.index.json").read_text())["weight_map"]
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    name = "model.norm.weight"
    swapped = folders.write_sharded(tmp_path / "swapped", **{name: other[file[name]]})
    line = refused(capsys, tmp_path, swapped)
    assert name in line and "index.json" in line
    outside = folders.write_sharded(tmp_path / "outside", **{name: "../x.safetensors"})
    assert "../x.safetensors" in refused(capsys, tmp_path, outside)
    (outside / "model.safetensors.index.json").write_text("[]")
    assert "is not an index of tensors" in refused(capsys, tmp_path, outside)
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    assert "is not an index of tensors" in refused(capsys, tmp_path, outside)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    folder = folders.write(tmp_path / "hf")
    words = {f"w{i}": i for i in range(folders.V)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    line = refused(capsys, tmp_path, folder)
    assert "hf/tokenizer.json has 261 tokens" in line and "vocab_size=260" in line


def test_a_tokenizer_of_another_library_is_not_passed_over(tmp_path, capsys):
    folder = folders.write(tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    line = refused(capsys, tmp_path, folder)
    assert "tokenizer.model but no tokenizer.json" in line and "AutoTokenizer" in line


def test_fewer_tokens_than_bytes_need_a_tokenizer(tmp_path, capsys):
    shapes = {
        n: np.zeros(s, np.float32) for n, s in folders.shapes({**folders.CONFIG, "vocab_size": 90})
    }
    folder = folders.write(tmp_path / "hf", shapes, vocab_size=90)
    line = refused(capsys, tmp_path, folder)
    assert "tokenizer.json" in line and "90" in line


def test_a_mesh_that_does_not_divide_the_experts_is_refused(tmp_path, capsys):
    folder = folders.write(tmp_path / "hf")
    line = refused(capsys, tmp_path, folder, "--config.mesh.expert=3", "--config.mesh.data=1")
    assert "expert" in line and "3" in line and "4" in line


def test_folders_in_use_are_left_alone(tmp_path, capsys):
    folder, run = folders.write(tmp_path / "hf"), tmp_path / "run"
    comes_in(folder, run)
    line = refused(capsys, tmp_path, folder)
    assert "--workdir=" in line and "name a new folder" in line
    line = said(capsys, f"--to-hf={run}", f"--out={folder}")
    assert f"--out={folder} is in use" in line
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    line = said(capsys, f"--from-hf={folder}", f"--workdir={tmp_path / 'full'}")
    assert "not empty" in line
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


def test_a_folder_without_a_checkpoint_cannot_go_out(tmp_path, capsys):
    folder, run, out = folders.write(tmp_path / "hf"), tmp_path / "run", tmp_path / "out"
    assert "config.json" in said(capsys, f"--to-hf={tmp_path}", f"--out={out}")
    comes_in(folder, run)
    assert "steps there: [0]" in said(capsys, f"--to-hf={run}", f"--out={out}", "--step=7")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    assert "no checkpoint to export" in said(capsys, f"--to-hf={run}", f"--out={out}")
    assert not out.exists()


FLAGS = {
    "": "--from-hf",
    "--workdir=run": "--from-hf",
    "--from-hf=hf": "--from-hf needs --workdir",
    "--to-hf=run": "--to-hf needs --out",
    "--from-hf=hf --to-hf=run": "not allowed with",
    "--from-hf=hf --workdir=run --out=out": "--out=out belongs to --to-hf",
    "--from-hf=hf --workdir=run --step=0": "--step=0 belongs to --to-hf",
    "--from-hf=hf --workdir=run --dtype=bfloat16": "--dtype=bfloat16 belongs to --to-hf",
    "--to-hf=run --out=out --workdir=w": "--workdir=w belongs to --from-hf",
    "--to-hf=run --out=out --config.train.steps=3": "--config.train.steps=3 has no effect",
    "--to-hf=run --out=out --dtype=int8": "--dtype",
    "--to-hf=run --out=out --dtypes=float32": "did you mean --dtype",
    "--to-hf= --out=out": "--to-hf= is empty",
    "--from-hf= --workdir=run": "--from-hf= is empty",
    "--to-hf=run --out=": "--to-hf needs --out",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_do_not_belong_together_are_named(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = said(capsys, *flags.split())
    assert FLAGS[flags] in line, line
    assert not list(tmp_path.iterdir())
