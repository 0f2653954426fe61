"""Tiny models of published families with shapes drawn at random, made by transformers.

Every size, option and weight is drawn from a seed, within the rules of the family: nothing is at
the value at which a mistake would not show (norms of 1, biases of 0, a width that divides).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Draw = Callable[[np.random.Generator], dict[str, Any]]
"""The keys of a config beside those of ``decoder``."""


def decoder(rng: np.random.Generator) -> dict[str, Any]:
    """Keys that all families share."""
    kv_heads = int(rng.choice([1, 2]))
    heads = kv_heads * int(rng.choice([2, 3]))
    return {
        "vocab_size": int(rng.integers(258, 300)),
        "hidden_size": heads * int(rng.choice([6, 8, 10])),
        "intermediate_size": int(rng.integers(10, 40)),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": float(rng.choice([1e-4, 1e-3])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": rope(rng),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def rope(rng: np.random.Generator, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
    """Rotary positions, whose scaling begins at 8 tokens."""
    kind = str(rng.choice(kinds or ("default", "linear", "llama3", "yarn")))
    keys: dict[str, Any] = {"rope_type": kind, "rope_theta": float(rng.choice([50.0, 300.0]))}
    if kind != "default":
        keys["factor"] = float(rng.choice([2.0, 4.0]))
    if kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = 8
    if kind == "llama3":
        keys |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([3.0, 4.0]))}
    if kind == "yarn":
        keys |= {"beta_fast": float(rng.choice([4.0, 32.0])), "beta_slow": 1.0}
        keys["truncate"] = bool(rng.integers(2))
        if rng.integers(2):
            keys["attention_factor"] = 1.3
    return keys


def own_width(rng: np.random.Generator) -> dict[str, Any]:
    """Heads whose widths do not add up to the model's."""
    return {"head_dim": int(rng.choice([4, 12, 14]))}


def window(rng: np.random.Generator) -> dict[str, Any]:
    return {"sliding_window": int(rng.choice([3, 5]))}


def switched_window(rng: np.random.Generator) -> dict[str, Any]:
    used = bool(rng.integers(2))
    return window(rng) | {"use_sliding_window": used, "max_window_layers": 0}


def biases(rng: np.random.Generator) -> dict[str, Any]:
    return {"attention_bias": bool(rng.integers(2))}


def routed(
    rng: np.random.Generator, experts: str = "num_experts", groups: int = 1
) -> dict[str, Any]:
    """Experts, of which a token visits k."""
    return {
        experts: groups * int(rng.integers(3, 6)),
        "num_experts_per_tok": int(rng.integers(2, 4)),
    }


def local_experts(rng: np.random.Generator) -> dict[str, Any]:
    return routed(rng, "num_local_experts")


def renormalised(rng: np.random.Generator) -> dict[str, Any]:
    return {"norm_topk_prob": bool(rng.integers(2))}


def qwen_layers(rng: np.random.Generator) -> dict[str, Any]:
    layers = [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}]
    return {"num_hidden_layers": 4, **layers[rng.integers(3)], **narrow(rng)}


def narrow(rng: np.random.Generator) -> dict[str, Any]:
    return {"moe_intermediate_size": int(rng.integers(6, 20))}


def many_experts(rng: np.random.Generator) -> dict[str, Any]:
    """DeepSeek's keys: dense layers first, shared experts, routed ones in groups."""
    return {
        **routed(rng, "n_routed_experts"),
        **narrow(rng),
        "n_shared_experts": int(rng.integers(1, 3)),
        "first_k_dense_replace": int(rng.integers(0, 2)),
        "routed_scaling_factor": float(rng.choice([1.5, 2.5])),
    }


def grouped(rng: np.random.Generator) -> dict[str, Any]:
    groups = int(rng.choice([2, 4]))
    return {**routed(rng, "n_routed_experts", groups), "n_group": groups, "topk_group": groups // 2}


def latent(rng: np.random.Generator) -> dict[str, Any]:
    """Multi-head latent attention, with YaRN's factor of the scores."""
    factors = rope(rng, ("default", "yarn"))
    factors.pop("attention_factor", None)
    factors.pop("truncate", None)
    if factors["rope_type"] == "yarn":
        factors |= {"mscale": 1.0, "mscale_all_dim": float(rng.choice([0.5, 1.0]))}
    heads = int(rng.integers(2, 5))
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None if rng.integers(2) else 10,
        "kv_lora_rank": int(rng.choice([6, 12])),
        "qk_nope_head_dim": int(rng.choice([6, 10])),
        "qk_rope_head_dim": int(rng.choice([4, 8])),
        "v_head_dim": int(rng.choice([6, 9])),
        "rope_parameters": factors,
    }


def multipliers(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "embedding_multiplier": 1.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": float(rng.choice([0.2, 0.4])),
        "logits_scaling": 1.3,
    }


def _together(*draws: Draw, **fixed: Any) -> Draw:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for part in draws:
            keys |= part(rng)
        return keys | fixed

    return draw


def _gpt_oss(rng: np.random.Generator) -> dict[str, Any]:
    layers = int(rng.choice([2, 4]))
    types = ["sliding_attention", "full_attention"] * (layers // 2)
    return {"num_hidden_layers": layers, "layer_types": types, **biases(rng)}


def _llama4(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "num_hidden_layers": 4,
        "num_local_experts": int(rng.integers(2, 5)),
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": int(rng.integers(10, 40)),
        "interleave_moe_layer_step": int(rng.choice([1, 2])),
        "no_rope_layers": [1, 0, 1, 0] if rng.integers(2) else [1, 1, 1, 0],
        "attention_chunk_size": int(rng.choice([3, 5])),
        "use_qk_norm": bool(rng.integers(2)),
        "attn_temperature_tuning": True,
        "attn_scale": 0.3,
        "floor_scale": 4,
        "rope_parameters": rope(rng, ("default", "llama3")),
    }


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A family: the name of its classes in transformers, and the keys that are drawn.

    ``balanced``: True if transformers has its auxiliary loss.
    """

    name: str
    keys: Draw
    balanced: bool = False


FAMILIES = {
    "llama": Drawn("Llama", _together(own_width, biases)),
    "qwen3": Drawn("Qwen3", _together(own_width, biases, switched_window)),
    "mixtral": Drawn("Mixtral", _together(own_width, window, local_experts), True),
    "qwen2_moe": Drawn(
        "Qwen2Moe",
        _together(
            routed,
            qwen_layers,
            renormalised,
            switched_window,
            lambda rng: {
                "shared_expert_intermediate_size": int(rng.integers(10, 40)),
                "qkv_bias": bool(rng.integers(2)),
            },
        ),
        True,
    ),
    "qwen3_moe": Drawn(
        "Qwen3Moe",
        _together(routed, qwen_layers, renormalised, own_width, biases, switched_window),
        True,
    ),
    "olmoe": Drawn("Olmoe", _together(routed, renormalised, biases), True),
    "dots1": Drawn("Dots1", _together(many_experts, renormalised, own_width, biases, grouped)),
    "glm4_moe": Drawn(
        "Glm4Moe",
        _together(
            many_experts,
            renormalised,
            biases,
            grouped,
            lambda rng: {"head_dim": 12, "use_qk_norm": bool(rng.integers(2))},
        ),
    ),
    "gpt_oss": Drawn(
        "GptOss",
        _together(own_width, window, local_experts, _gpt_oss),
        True,
    ),
    "deepseek_v2": Drawn(
        "DeepseekV2",
        _together(latent, many_experts, grouped, topk_method="group_limited_greedy"),
    ),
    "deepseek_v3": Drawn(
        "DeepseekV3", _together(latent, many_experts, renormalised, grouped, biases)
    ),
    "granitemoe": Drawn("GraniteMoe", _together(local_experts, multipliers, biases), True),
    "granitemoeshared": Drawn(
        "GraniteMoeShared",
        _together(local_experts, multipliers, biases, shared_intermediate_size=18),
        True,
    ),
    "llama4_text": Drawn("Llama4", _together(own_width, biases, _llama4)),
}


def build(family: str, seed: int, folder: Path, **changed: Any) -> Any:
    """A model of transformers with weights drawn from the seed, saved in ``folder``."""
    import torch
    import transformers

    torch.set_num_threads(1)
    drawn = FAMILIES[family]
    rng = np.random.default_rng([seed, *family.encode()])
    keys = {**decoder(rng), **drawn.keys(rng), **changed}
    text = "Text" if family == "llama4_text" else ""
    config = getattr(transformers, f"{drawn.name}{text}Config")(**keys)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{drawn.name}ForCausalLM")(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


def randomise(model: Any, seed: int) -> None:
    """Draws every weight: matrices about 0, scales about 1, and the routers' corrections."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = name.endswith("norm.weight") or "layernorm" in name
            spread = 0.4 if scale else 0.3 if x.ndim == 1 else 1.5 * x.shape[-1] ** -0.5
            if "experts." in name and "bias" in name:
                spread = 0.3
            x.copy_(spread * torch.randn(x.shape, generator=noise) + (1.0 if scale else 0.0))
        for name, x in model.named_buffers():
            if name.endswith("correction_bias"):
                x.copy_(0.5 * torch.rand(x.shape, generator=noise))


def load(folder: Path) -> Any:
    """The model of a folder, as transformers reads it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    model.config._experts_implementation = "eager"
    return model.eval()
