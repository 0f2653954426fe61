"""Mixtral (Jiang et al., arXiv 2401.04088)."""

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
from moejax.hf.keys import Fixed, Gate, HeadWidth, Key, Rope, Window

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(theta=1e6),
        Window(),
        Fixed({"moe.every": 1, "moe.first_dense": 0, "moe.dense_layers": ""}),
        Key("num_local_experts", "moe.num_experts"),
        Key("intermediate_size", "moe.d_ff"),
        Gate(
            "top_k",
            (("num_experts_per_tok", "k", 2), ("router_jitter_noise", "jitter", 0.0)),
            {"renormalize": True, "bias": False},
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
