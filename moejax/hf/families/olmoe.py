"""OLMoE (Muennighoff et al., arXiv 2409.02060)."""

from moejax.hf.families.family import (
    DECODER,
    ENDS,
    QWEN_EXPERTS,
    AuxiliaryLoss,
    Epsilon,
    Family,
    attention,
    norms,
    router,
)
from moejax.hf.families.llama import ALL_BIASES
from moejax.hf.families.qwen import GATE
from moejax.hf.keys import Fixed, HeadWidth, Key, Only, Rope

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(named=False),
        Rope(),
        ALL_BIASES,
        Only("clip_qkv", None),
        Fixed({"model.qk_norm": "projection"}),
        Fixed({"moe.every": 1, "moe.first_dense": 0, "moe.dense_layers": ""}),
        Key("num_experts", "moe.num_experts", also="num_local_experts"),
        Key("intermediate_size", "moe.d_ff"),
        GATE,
        AuxiliaryLoss(),
    ),
    rows=(*ENDS, *norms(), *attention(), *router("mlp.gate"), *QWEN_EXPERTS),
)
