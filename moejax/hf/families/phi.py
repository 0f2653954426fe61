"""Phi-3.5-MoE (Abdin et al., arXiv 2404.14219), which GRIN (arXiv 2409.12136) trained."""

from moejax.hf.families.family import (
    DECODER,
    ENDS,
    AuxiliaryLoss,
    Epsilon,
    Family,
    attention,
    experts,
    norms,
    router,
)
from moejax.hf.families.llama import ALL_BIASES
from moejax.hf.keys import Fixed, Gate, HeadWidth, Key, Rope, Window

PHIMOE = Family(
    "phimoe",
    "PhimoeForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(theta=1e6),
        Window(),
        ALL_BIASES,
        Key("lm_head_bias", "model.head_bias", False),
        Fixed(
            {
                "model.norm": "layer",
                "moe.every": 1,
                "moe.first_dense": 0,
                "moe.dense_layers": "",
            }
        ),
        Key("num_local_experts", "moe.num_experts"),
        Key("intermediate_size", "moe.d_ff"),
        Gate(
            "sparsemixer",
            (("num_experts_per_tok", "k", 2), ("router_jitter_noise", "jitter", 0.01)),
        ),
        AuxiliaryLoss(),
    ),
    rows=(
        *ENDS,
        *norms(),
        *attention(),
        *router("block_sparse_moe.gate"),
        *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
)
