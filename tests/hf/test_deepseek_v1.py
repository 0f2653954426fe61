"""DeepSeekMoE (arXiv 2401.06066), whose code is not part of transformers.

A folder with the names that its authors published is beside the paper's formulas in numpy, and,
exported as the Qwen2-MoE that computes the same, beside transformers.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moejax.config import load
from moejax.hf.exported import export_model
from moejax.tasks.language.task import LanguageModel
from moejax.train import evaluate
from tests.hf import pair as pairs
from tests.hf.pair import VALID, L, Pair, close

V, D, HEADS, KV_HEADS, LAYERS, FIRST, E, K, SHARED, F, DENSE = 260, 24, 4, 2, 3, 1, 6, 3, 2, 10, 30
WIDTH, EPS, THETA = D // HEADS, 1e-4, 100.0

CONFIG = {
    "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "vocab_size": V,
    "hidden_size": D, "intermediate_size": DENSE, "moe_intermediate_size": F,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "n_shared_experts": SHARED, "n_routed_experts": E, "num_experts_per_tok": K,
    "moe_layer_freq": 1, "first_k_dense_replace": FIRST, "norm_topk_prob": False,
    "scoring_func": "softmax", "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": EPS, "rope_theta": THETA, "rope_scaling": None, "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def drawn(seed: int) -> dict[str, np.ndarray]:
    """Weights under the names of deepseek-ai/deepseek-moe-16b-base."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (1.5 * shape[-1] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)

    def scale() -> np.ndarray:
        return (1 + 0.4 * rng.standard_normal(D)).astype(np.float32)

    def ffn(at: str, width: int) -> dict[str, np.ndarray]:
        shapes = {"gate": (width, D), "up": (width, D), "down": (D, width)}
        return {f"{at}.{name}_proj.weight": normal(*shape) for name, shape in shapes.items()}

    named = {"model.embed_tokens.weight": normal(V, D), "lm_head.weight": normal(V, D)}
    named["model.norm.weight"] = scale()
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        named[f"{at}.input_layernorm.weight"] = scale()
        named[f"{at}.post_attention_layernorm.weight"] = scale()
        for name, rows in (("q", D), ("k", WIDTH * KV_HEADS), ("v", WIDTH * KV_HEADS), ("o", D)):
            named[f"{at}.self_attn.{name}_proj.weight"] = normal(rows, D)
        if layer < FIRST:
            named |= ffn(f"{at}.mlp", DENSE)
            continue
        named[f"{at}.mlp.gate.weight"] = normal(E, D)
        named |= ffn(f"{at}.mlp.shared_experts", SHARED * F)
        for expert in range(E):
            named |= ffn(f"{at}.mlp.experts.{expert}", F)
    return named


def formula(named: dict[str, np.ndarray], token_L: np.ndarray) -> np.ndarray:
    """Logits [L, V] of one text, in float64: the paper's equations and Llama's decoder."""
    w = {name: x.astype(np.float64) for name, x in named.items()}

    def norm(x, at):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[f"{at}.weight"]

    def ffn(x, at):
        gate = x @ w[f"{at}.gate_proj.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * (x @ w[f"{at}.up_proj.weight"].T)
        return hidden @ w[f"{at}.down_proj.weight"].T

    def turned(x):  # [L, heads, WIDTH]; pairs are WIDTH / 2 apart
        angle = np.arange(len(x))[:, None, None] * THETA ** (-np.arange(WIDTH // 2) * 2 / WIDTH)
        one, two = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    x = w["model.embed_tokens.weight"][token_L]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (h @ w[f"{at}.self_attn.{n}_proj.weight"].T).reshape(len(x), -1, WIDTH) for n in "qkv"
        )
        q, k = turned(q), np.repeat(turned(k), HEADS // KV_HEADS, axis=1)
        score = np.einsum("lhi,mhi->hlm", q, k) / np.sqrt(WIDTH)
        score = np.exp(np.where(np.tri(len(x), dtype=bool), score, -np.inf))
        share = score / score.sum(-1, keepdims=True)
        mixed = np.einsum("hlm,mhi->lhi", share, np.repeat(v, HEADS // KV_HEADS, axis=1))
        x = x + mixed.reshape(len(x), -1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        if layer < FIRST:
            x = x + ffn(h, f"{at}.mlp")
            continue
        y = ffn(h, f"{at}.mlp.shared_experts")
        s = np.exp(h @ w[f"{at}.mlp.gate.weight"].T)
        s /= s.sum(-1, keepdims=True)
        for token in range(len(x)):
            for expert in np.argsort(-s[token])[:K]:  # weights are not normalised again
                out = ffn(h[token], f"{at}.mlp.experts.{expert}")
                y[token] += s[token, expert] * out
        x = x + y
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    at: Path = tmp_path_factory.mktemp("deepseek")
    (at / "hf").mkdir()
    (at / "hf" / "config.json").write_text(json.dumps(CONFIG))
    save_file(drawn(5), at / "hf" / "model.safetensors")
    pairs.bring_in(at / "hf", at / "run")
    config = load(str(at / "run" / "config.json")).config
    with evaluate.open_run(config, str(at / "run"), None) as (run, state, _):
        assert isinstance(run.task, LanguageModel)
        return Pair(None, at / "hf", at / "run", config, run.task, jax.device_get(state))


TOKENS = np.random.default_rng(2).integers(3, V, (3, L))


@pytest.mark.slow
def test_logits_are_those_of_the_formulas(pair):
    found = pair.ours(TOKENS, VALID["none"]).logits_BLV
    for row, token_L in enumerate(TOKENS):
        close(found[row], formula(drawn(5), token_L), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("transformers") or not importlib.util.find_spec("torch"),
    reason="needs the extra 'parity' (torch, transformers)",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_goes_out_as_the_qwen2_moe_that_computes_the_same(pair, tmp_path):
    from tests.hf import tiny

    assert export_model(pair.workdir, tmp_path / "out")["family"] == "qwen2_moe"
    theirs = tiny.load(tmp_path / "out")
    assert type(theirs).__name__ == "Qwen2MoeForCausalLM"
    for padding in ("none", "left"):
        valid_BL = VALID[padding]
        ours, found = pair.ours(TOKENS, valid_BL), pairs.theirs_of(theirs, TOKENS, valid_BL)
        close(found.logits_BLV[valid_BL], ours.logits_BLV[valid_BL], 1e-5)
        assert ours.expert_NLK is not None and found.expert_NLK is not None
        valid = valid_BL.reshape(-1)
        np.testing.assert_array_equal(found.expert_NLK[:, valid], ours.expert_NLK[:, valid])
