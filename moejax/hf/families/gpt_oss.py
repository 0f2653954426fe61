"""GPT-OSS (OpenAI, arXiv 2508.10925)."""

from moejax.hf.families.family import (
    DECODER,
    ENDS,
    LAYER,
    AuxiliaryLoss,
    Epsilon,
    Family,
    attention,
    norms,
    router,
)
from moejax.hf.keys import Choice, Fixed, Gate, HeadWidth, Key, Only, Rope, WindowPattern
from moejax.hf.rows import Row

_AT = f"{LAYER}mlp.experts."

GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(theta=150000.0),
        WindowPattern(default=2),
        Choice(
            "attention_bias", "model.attention_bias", ((True, "all"), (False, "none")), default=True
        ),
        Only("swiglu_alpha", 1.702),
        Only("swiglu_limit", 7.0),
        Fixed(
            {
                "model.attention_sinks": True,
                "moe.activation": "clamped_swiglu",
                "moe.expert_bias": True,
                "moe.every": 1,
                "moe.first_dense": 0,
                "moe.dense_layers": "",
            }
        ),
        Key("num_local_experts", "moe.num_experts"),
        Key("intermediate_size", "moe.d_ff"),
        Gate(
            "top_k",
            (("num_experts_per_tok", "k", 4),),
            {"renormalize": True, "bias": True, "jitter": 0.0},
        ),
        AuxiliaryLoss(),
    ),
    rows=(
        *ENDS,
        *norms(),
        *attention(),
        *router("mlp.router"),
        Row(
            f"{_AT}gate_up_proj",
            ("ffn/gate_EDF", "ffn/up_EDF"),
            linear=False,
            stacked=True,
            join="interleaved",
        ),
        Row(
            f"{_AT}gate_up_proj_bias",
            ("ffn/gate_bias_EF", "ffn/up_bias_EF"),
            vector=True,
            stacked=True,
            join="interleaved",
        ),
        Row(f"{_AT}down_proj", ("ffn/down_EFD",), linear=False, stacked=True),
        Row(f"{_AT}down_proj_bias", ("ffn/down_bias_ED",), vector=True, stacked=True),
    ),
)
