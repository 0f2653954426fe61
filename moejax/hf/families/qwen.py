"""Qwen1.5-MoE, Qwen2-MoE (arXiv 2407.10671) and Qwen3-MoE (arXiv 2505.09388)."""

import dataclasses

from moejax.hf.families.family import (
    DECODER,
    ENDS,
    LAYER,
    QWEN_EXPERTS,
    AuxiliaryLoss,
    Epsilon,
    Family,
    attention,
    dense,
    norms,
    router,
    shared,
)
from moejax.hf.families.llama import ALL_BIASES
from moejax.hf.keys import Choice, DenseLayers, Fixed, Gate, HeadWidth, Key, Rope, Window
from moejax.hf.rows import Row

GATE = Gate(
    "top_k",
    (("num_experts_per_tok", "k", None), ("norm_topk_prob", "renormalize", False)),
    {"bias": False, "jitter": 0.0},
)

_OF_BOTH = (
    DenseLayers(),
    Key("intermediate_size", "model.d_ff"),
    Key("moe_intermediate_size", "moe.d_ff"),
    Key("num_experts", "moe.num_experts", also="num_local_experts"),
    GATE,
    AuxiliaryLoss(),
)

_QWEN2 = (
    *DECODER,
    Epsilon(),
    HeadWidth(named=False),
    Rope(),
    Window(switch="use_sliding_window"),
    Choice("qkv_bias", "model.attention_bias", ((True, "qkv"), (False, "none")), default=True),
    *_OF_BOTH,
    Key("shared_expert_intermediate_size", "moe.shared_d_ff"),
)

_ROWS = (*ENDS, *norms(), *attention(), *dense(), *router("mlp.gate"), *QWEN_EXPERTS)
_SHARED_GATE = f"{LAYER}mlp.shared_expert_gate.weight"

QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    rules=(*_QWEN2, Fixed({"moe.shared_experts": 1, "moe.shared_gate": True})),
    rows=(*_ROWS, *shared("mlp.shared_expert"), Row(_SHARED_GATE, ("ffn/shared_gate_D",))),
)

UNGATED_QWEN2_MOE = dataclasses.replace(
    QWEN2_MOE,
    rules=(*_QWEN2, Fixed({"moe.shared_experts": 1, "moe.shared_gate": False})),
    rows=(
        *_ROWS,
        *shared("mlp.shared_expert", factor=2.0),
        Row(_SHARED_GATE, ("ffn_norm/scale_D",), zeros=True),
    ),
    reads=False,
)
"""Shared experts without a gate: a gate of zeros is 1/2, which doubled outputs make up for."""

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(),
        Window(switch="use_sliding_window"),
        ALL_BIASES,
        Fixed({"model.qk_norm": "head"}),
        *_OF_BOTH,
    ),
    rows=_ROWS,
)
