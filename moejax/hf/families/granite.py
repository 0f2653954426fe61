"""Granite-MoE (IBM, Granite 3.0), with and without a shared expert."""

import dataclasses
from typing import Any

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
from moejax.hf.families.llama import ALL_BIASES
from moejax.hf.keys import Fields, Fixed, Gate, HeadWidth, Key, Rope, Theirs
from moejax.hf.rows import Row


@dataclasses.dataclass(frozen=True)
class Divided:
    """A key that divides where the field multiplies."""

    theirs: str
    ours: str

    def read(self, theirs: Theirs) -> Fields:
        return {self.ours: 1.0 / theirs.number(self.theirs, 1.0)}

    def write(self, fields: Fields) -> dict[str, Any]:
        return {self.theirs: 1.0 / fields[self.ours]}


_RULES = (
    *DECODER,
    Epsilon(),
    HeadWidth(named=False),
    Rope(),
    ALL_BIASES,
    Key("embedding_multiplier", "model.embed_scale", 1.0),
    Key("residual_multiplier", "model.residual_scale", 1.0),
    Key("attention_multiplier", "model.attention_scale", 1.0),
    Divided("logits_scaling", "model.logit_scale"),
    Fixed({"moe.every": 1, "moe.first_dense": 0, "moe.dense_layers": ""}),
    Key("num_local_experts", "moe.num_experts"),
    Key("intermediate_size", "moe.d_ff"),
    Gate(
        "top_k",
        (("num_experts_per_tok", "k", 2),),
        {"renormalize": True, "bias": False, "jitter": 0.0},
    ),
    AuxiliaryLoss(),
)

_AT = f"{LAYER}block_sparse_moe."

_ROWS = (
    *ENDS,
    *norms(),
    *attention(),
    *router("block_sparse_moe.router.layer"),
    Row(f"{_AT}input_linear.weight", ("ffn/gate_EDF", "ffn/up_EDF"), stacked=True),
    Row(f"{_AT}output_linear.weight", ("ffn/down_EFD",), stacked=True),
)

GRANITE_MOE = Family("granitemoe", "GraniteMoeForCausalLM", _RULES, _ROWS)

GRANITE_MOE_SHARED = Family(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    rules=(
        *_RULES,
        Fixed({"moe.shared_experts": 1}),
        Key("shared_intermediate_size", "moe.shared_d_ff"),
    ),
    rows=(
        *_ROWS,
        Row(f"{LAYER}shared_mlp.input_linear.weight", ("ffn/shared/gate_DF", "ffn/shared/up_DF")),
        Row(f"{LAYER}shared_mlp.output_linear.weight", ("ffn/shared/down_FD",)),
    ),
)
