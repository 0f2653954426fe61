"""A whole model beside transformers' Mixtral with the same weights, wherever the padding lies."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import gating
from moejax.options import AttentionOptions, DispatchOptions, MoEOptions, RopeOptions, TextOptions
from moejax.tasks.language.model import LM, LMConfig
from moejax.types import Context

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("transformers") or not importlib.util.find_spec("torch"),
        reason="needs the extra 'parity' (torch, transformers)",
    ),
]

V, D, F, E, LAYERS, HEADS, KV_HEADS, WIDTH, L = 40, 32, 48, 4, 2, 4, 2, 8, 12
BATCH = 3

VALID = np.ones((BATCH, L), bool)
PADDING = {
    "none": VALID,
    "right": np.arange(L) < np.array([[L], [L - 5], [L - 1]]),
    "left": np.arange(L) >= np.array([[0], [5], [1]]),
    "gaps": np.random.default_rng(1).random((BATCH, L)) < 0.7,
}


def ours() -> LM:
    attention = AttentionOptions(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH, rope=RopeOptions(theta=10000.0),
        implementation="xla",
    )  # fmt: skip
    experts = MoEOptions(
        gate=gating.make("mixtral", k=2), d_ff=F,
        config=DispatchOptions(num_experts=E, transport="dropless").config,
        balance_scope="batch", vocab_size=V,
    )  # fmt: skip
    config = LMConfig(
        d_model=D, num_layers=LAYERS, norm_eps=1e-5, attention=attention, experts=experts,
        text=TextOptions(tie_embeddings=False),
    )  # fmt: skip
    return LM(config, rngs=nnx.Rngs(0))


def theirs(lm: LM):
    """Mixtral with the weights of ours; transformers stores matrices as [out, in]."""
    import torch
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH,
        num_local_experts=E, num_experts_per_tok=2, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    config._experts_implementation = config._attn_implementation = "eager"
    model = transformers.MixtralForCausalLM(config).eval()
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(lm)))
    block = params["periods"]["blocks"][0]
    named = {
        "model.embed_tokens.weight": params["embed_VD"] * D**0.5,  # ours scales what it looks up
        "model.norm.weight": params["final_norm"]["scale_D"],
        "lm_head.weight": params["head_DV"].T,
    }
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        for name, key in (("q", "query_DHI"), ("k", "key_DJI"), ("v", "value_DJI")):
            weight = block["attention"][key][n].reshape(D, -1).T
            named[f"{at}.self_attn.{name}_proj.weight"] = weight
        named |= {
            f"{at}.self_attn.o_proj.weight": block["attention"]["out_HID"][n].reshape(-1, D).T,
            f"{at}.input_layernorm.weight": block["attention_norm"]["scale_D"][n],
            f"{at}.post_attention_layernorm.weight": block["ffn_norm"]["scale_D"][n],
            f"{at}.mlp.gate.weight": block["ffn"]["router"]["router_DE"][n].T,
            f"{at}.mlp.experts.gate_up_proj": np.concatenate(
                [block["ffn"]["gate_EDF"][n], block["ffn"]["up_EDF"][n]], axis=-1
            ).swapaxes(1, 2),
            f"{at}.mlp.experts.down_proj": block["ffn"]["down_EFD"][n].swapaxes(1, 2),
        }
    tensors = {key: torch.tensor(np.array(value)) for key, value in named.items()}
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    return model


@pytest.fixture(scope="module")
def models():
    lm = ours()
    return lm, theirs(lm)


@pytest.mark.parametrize("padding", PADDING)
def test_logits_equal_those_of_transformers_wherever_the_padding_lies(models, padding):
    import torch

    lm, mixtral = models
    valid = PADDING[padding]
    rng = np.random.default_rng(0)
    token = np.where(valid, rng.integers(0, V, (BATCH, L)), 0).astype(np.int32)
    context = Context.of(BATCH, L, token_BL=jnp.asarray(token), valid_BL=jnp.asarray(valid))
    logits = lm(jnp.asarray(token), context, lm.init_gate_state(), False)[0]
    with torch.no_grad():
        wanted = mixtral(
            input_ids=torch.tensor(token, dtype=torch.long),
            attention_mask=torch.tensor(valid, dtype=torch.long),
            position_ids=torch.tensor(np.array(context.position_BL), dtype=torch.long),
        ).logits.numpy()
    # Both float32; sums of at most 48 products in another order, over two layers.
    np.testing.assert_allclose(np.asarray(logits)[valid], wanted[valid], rtol=1e-4, atol=1e-5)
    assert valid.all() == (padding == "none")
