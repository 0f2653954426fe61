"""Dense decoders: Llama (Touvron et al., arXiv 2302.13971) and Qwen3 (arXiv 2505.09388)."""

from moejax.hf.families.family import DECODER, ENDS, Epsilon, Family, attention, dense, norms
from moejax.hf.keys import Choice, Fixed, HeadWidth, Key, Only, Rope, Window

ALL_BIASES = Choice(
    "attention_bias", "model.attention_bias", ((False, "none"), (True, "all")), default=False
)

NO_EXPERTS = Fixed({"moe.every": 0, "moe.first_dense": 0, "moe.dense_layers": ""})

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(),
        ALL_BIASES,
        Only("mlp_bias", False),
        NO_EXPERTS,
        Key("intermediate_size", "model.d_ff"),
    ),
    rows=(*ENDS, *norms(), *attention(), *dense()),
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(),
        ALL_BIASES,
        Window(switch="use_sliding_window"),
        NO_EXPERTS,
        Fixed({"model.qk_norm": "head"}),
        Key("intermediate_size", "model.d_ff"),
    ),
    rows=(*ENDS, *norms(), *attention(), *dense()),
)
