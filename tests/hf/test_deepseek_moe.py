"""DeepSeekMoE v1, for which transformers has no class, against Qwen2-MoE with a gate of zeros."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load
from moejax.hf.exported import export_model
from moejax.hf.imported import import_model
from moejax.train import evaluate
from moejax.types import Context

BOTH = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
OF_QWEN = {
    "num_experts": 4,
    "mlp_only_layers": [0],
    "shared_expert_intermediate_size": 48,
    "qkv_bias": False,
}
OF_DEEPSEEK = {
    "model_type": "deepseek",
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "rope_theta": 10000.0,
    "scoring_func": "softmax",
}


@pytest.mark.slow
def test_shared_experts_without_a_gate_are_qwens_doubled_behind_a_gate_of_zeros(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**BOTH, **OF_QWEN)
    model = transformers.Qwen2MoeForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, x in model.eval().named_parameters():
            spread, centre = (0.5, 1.0) if x.ndim == 1 else (0.2, 0.0)
            spread = 0.0 if "shared_expert_gate" in name else spread
            x.copy_(torch.randn_like(x) * spread + centre)
    model.save_pretrained(tmp_path / "qwen")
    qwen = safetensors.load_file(tmp_path / "qwen" / "model.safetensors")
    half = {name: 0.5 if "shared_expert.down_proj" in name else 1.0 for name in qwen}
    deepseek = {
        name.replace("shared_expert.", "shared_experts."): np.float32(half[name]) * x
        for name, x in qwen.items()
        if "shared_expert_gate" not in name
    }
    (tmp_path / "deepseek").mkdir()
    safetensors.save_file(deepseek, tmp_path / "deepseek" / "model.safetensors")
    (tmp_path / "deepseek" / "config.json").write_text(json.dumps({**BOTH, **OF_DEEPSEEK}))

    assert import_model(tmp_path / "deepseek", tmp_path / "run")["family"] == "deepseek"
    token = np.random.default_rng(0).integers(3, 300, (2, 24))
    with torch.no_grad():
        wanted = model(torch.tensor(token)).logits.numpy()
    ours = load(str(tmp_path / "run" / "config.json")).config
    token_BL = jnp.asarray(token, jnp.int32)
    with evaluate.open_run(ours, str(tmp_path / "run"), None) as (run, state, _):
        lm = run.task.built(state.params)
        context = Context.of(*token.shape, token_BL=token_BL)
        got, _ = lm(token_BL, context, state.gate_state, False)
    # float32 sums in another order, over three layers.
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())

    assert export_model(tmp_path / "run", tmp_path / "back")["family"] == "qwen2_moe"
    back = safetensors.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == qwen.keys()
    for name, x in qwen.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(token)).logits.numpy(), wanted)
