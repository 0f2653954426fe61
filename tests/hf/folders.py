"""Hugging Face folders written by hand, without transformers: a tiny Mixtral."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

V, D, F, E, LAYERS, HEADS, KV_HEADS = 260, 16, 12, 4, 2, 4, 2
WIDTH = D // HEADS

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "sliding_window": None,
}


def shapes(config: dict[str, Any] = CONFIG) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Mixtral's tensors, as its authors published them."""
    vocabulary, d, f = (config[x] for x in ("vocab_size", "hidden_size", "intermediate_size"))
    width = d // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, d)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocabulary, d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
        for name, rows in (("q", d), ("k", width), ("v", width), ("o", d)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, d)
        yield f"{at}.block_sparse_moe.gate.weight", (config["num_local_experts"], d)
        for expert in range(config["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                yield f"{at}.block_sparse_moe.experts.{expert}.{name}.weight", shape


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(shape) * 0.3).astype(np.float32) for n, shape in shapes()}


def write(folder: Path, values: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A Mixtral's folder, with changed keys of its config; None removes nothing, ``...`` does."""
    folder.mkdir(parents=True)
    keys = {name: value for name, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(tensors() if values is None else values, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, **missing: str) -> Path:
    """The same in two shards with an index."""
    write(folder)
    values = tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: values[name] for name in part}, folder / file)
    weights = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {}, "weight_map": {**weights, **missing}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
