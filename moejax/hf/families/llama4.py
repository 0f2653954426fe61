"""Llama 4 (Meta, 2025): the text model, also out of the model that sees images."""

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
    dense,
    norms,
    router,
    shared,
)
from moejax.hf.families.llama import ALL_BIASES
from moejax.hf.keys import Choice, Fields, Fixed, Gate, HeadWidth, Key, ListedSparse, Rope, Theirs
from moejax.hf.rows import Row


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Layers with rotary positions attend within chunks; every n-th has neither."""

    def read(self, theirs: Theirs) -> Fields:
        layers = theirs.whole("num_hidden_layers")
        step = theirs.whole("no_rope_layer_interval", 4, least=1)
        rope = theirs.get("no_rope_layers", None) or [
            int((i + 1) % step != 0) for i in range(layers)
        ]
        plain = [i + 1 for i, turned in enumerate(rope) if not turned]
        every = plain[0] if plain else 0
        if every and plain != list(range(every, layers + 1, every)):
            raise theirs.refuse("no_rope_layers", rope, "every n-th layer without rotation")
        types = theirs.get("layer_types", None)
        wanted = ["chunked_attention" if turned else "full_attention" for turned in rope]
        if types and types != wanted:
            raise theirs.refuse("layer_types", types, "chunks in the layers with rotation")
        tuned = theirs.get("attn_temperature_tuning", True)
        return {
            "model.window": theirs.whole("attention_chunk_size", 8192),
            "model.window_kind": "chunk",
            "model.global_every": every,
            "model.global_rope": False,
            "model.temperature": float(theirs.number("attn_scale", 0.1)) if tuned else 0.0,
            "model.temperature_length": theirs.whole("floor_scale", 8192),
        }

    def write(self, fields: Fields) -> dict[str, Any]:
        every = fields["model.global_every"]
        layers = range(1, fields["model.num_layers"] + 1)
        rope = [int(not every or layer % every != 0) for layer in layers]
        return {
            "no_rope_layers": rope,
            "layer_types": ["chunked_attention" if x else "full_attention" for x in rope],
            "attention_chunk_size": fields["model.window"] or None,
            "attn_temperature_tuning": fields["model.temperature"] > 0,
            "attn_scale": fields["model.temperature"] or 0.1,
            "floor_scale": fields["model.temperature_length"],
        }


@dataclasses.dataclass(frozen=True)
class Widths:
    """The width of routed experts, which the shared expert has too, and of dense layers."""

    def read(self, theirs: Theirs) -> Fields:
        width = theirs.whole("intermediate_size")
        return {
            "moe.d_ff": width,
            "moe.shared_d_ff": width,
            "model.d_ff": theirs.whole("intermediate_size_mlp"),
        }

    def write(self, fields: Fields) -> dict[str, Any]:
        return {
            "intermediate_size": fields["moe.d_ff"],
            "intermediate_size_mlp": fields["model.d_ff"],
        }


_AT = f"{LAYER}feed_forward.experts."

LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(interleaved=True, theta=500000.0),
        ALL_BIASES,
        Chunks(),
        Choice("use_qk_norm", "model.qk_norm", ((True, "unit"), (False, "none")), default=True),
        Fixed({"moe.shared_experts": 1, "moe.weigh_input": True}),
        Widths(),
        ListedSparse(),
        Key("num_local_experts", "moe.num_experts"),
        Gate(
            "loss_free",
            (("num_experts_per_tok", "k", 1),),
            {
                "score": "sigmoid",
                "renormalize": False,
                "route_scale": 1.0,
                "bias_rate": 0.0,
                "num_groups": 1,
                "top_groups": 1,
                "sequence_loss": 0.0,
            },
        ),
        AuxiliaryLoss(),
    ),
    rows=(
        *ENDS,
        *norms(),
        *attention(),
        *dense("feed_forward"),
        *router("feed_forward.router"),
        *shared("feed_forward.shared_expert"),
        Row(f"{_AT}gate_up_proj", ("ffn/gate_EDF", "ffn/up_EDF"), linear=False, stacked=True),
        Row(f"{_AT}down_proj", ("ffn/down_EFD",), linear=False, stacked=True),
    ),
)

LLAMA4_VISION = dataclasses.replace(
    LLAMA4,
    model_type="llama4",
    architecture="Llama4ForConditionalGeneration",
    within="text_config",
    prefix="language_model.",
    ignored=(*LLAMA4.ignored, "vision_model.", "multi_modal_projector."),
    writes=False,
)
"""The text model of a published checkpoint. It is written as the text model alone."""
