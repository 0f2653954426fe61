"""A family: what its models' configs and tensors are, in one table."""

import dataclasses
from typing import Any

from moejax.hf.keys import Fields, Fixed, Key, Only, Rule, Theirs
from moejax.hf.rows import Row


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one architecture.

    ``rows`` whose parameters a model does not have are left out for it. ``ignored``: tensors that
    do not matter, as beginnings or endings of names.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    reads: bool = True
    """False for a way to write models that are read by another family."""
    writes: bool = True
    """False for models that are written as those of another family, or that no program reads."""
    within: str = ""
    """The key of the config that holds the text model's, where there are others beside it."""
    prefix: str = ""
    """Begins the names of the text model's tensors."""

    def read(self, theirs: Theirs) -> Fields:
        """The fields of ours for a config of theirs.

        Raises:
          UserError: a key that is missing, or a value that is not supported.
        """
        fields: Fields = {}
        for rule in self.rules:
            fields |= rule.read(theirs)
        return fields

    def write(self, fields: Fields) -> dict[str, Any]:
        """The keys of theirs for the fields of ours, right where the family can express them."""
        keys: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for rule in self.rules:
            keys |= rule.write(fields)
        return keys


@dataclasses.dataclass(frozen=True)
class Epsilon:
    """The number that norms add, of queries and keys too."""

    also: bool = True

    def read(self, theirs: Theirs) -> Fields:
        eps = float(theirs.number("rms_norm_eps"))
        return {"model.norm_eps": eps} | ({"model.qk_norm_eps": eps} if self.also else {})

    def write(self, fields: Fields) -> dict[str, Any]:
        return {"rms_norm_eps": fields["model.norm_eps"]}


@dataclasses.dataclass(frozen=True)
class AuxiliaryLoss:
    """The weight of the balance loss, which is k at balance there and 1 here."""

    def read(self, theirs: Theirs) -> Fields:
        k = theirs.whole("num_experts_per_tok", 1) or 1
        weight = float(theirs.number("router_aux_loss_coef", 0.0))
        return {"moe.losses.load_balance": weight * k}

    def write(self, fields: Fields) -> dict[str, Any]:
        k = fields["moe.gate"].get("k", 1)
        return {"router_aux_loss_coef": fields["moe.losses.load_balance"] / k}


ORDINARY: dict[str, Any] = {
    "model.norm": "rms",
    "model.norm_place": "before",
    "model.residual_scale": 1.0,
    "model.embed_scale": 1.0,
    "model.head_bias": False,
    "model.logit_scale": 1.0,
    "model.logit_cap": 0.0,
    "model.activation": "swiglu",
    "model.attention_bias": "none",
    "model.qk_norm": "none",
    "model.attention_scale": 0.0,
    "model.attention_score_cap": 0.0,
    "model.attention_sinks": False,
    "model.window": 0,
    "model.global_every": 0,
    "model.global_rope": True,
    "model.temperature": 0.0,
    "model.mla_kv_rank": 0,
    "model.moa_experts": 0,
    "model.mod_capacity": 0.0,
    "moe.activation": "swiglu",
    "moe.shared_experts": 0,
    "moe.shared_gate": False,
    "moe.residual": False,
    "moe.expert_bias": False,
    "moe.weigh_input": False,
    "moe.transport": "dropless",
    "moe.eval_transport": "dropless",
    "moe.balance_scope": "batch",
    "moe.losses.z": 0.0,
}
"""A Llama-like decoder. A family's own rules come after and replace these."""

DECODER: tuple[Rule, ...] = (
    Fixed(ORDINARY),
    Key("vocab_size", "model.vocab_size"),
    Key("hidden_size", "model.d_model"),
    Key("num_hidden_layers", "model.num_layers"),
    Key("tie_word_embeddings", "model.tie_embeddings", False),
    Only("hidden_act", "silu", ("swish",)),
    Only("attention_dropout", 0.0, (0, None)),
)
"""Keys that all families share."""

ENDS = (
    Row("model.embed_tokens.weight", ("embed_VD",), linear=False),
    Row("model.norm.weight", ("final_norm/scale_D",), vector=True),
    Row("model.norm.bias", ("final_norm/bias_D",), vector=True),
    Row("lm_head.weight", ("head_DV",)),
    Row("lm_head.bias", ("head_bias_V",), vector=True),
)

LAYER = "model.layers.{layer}."


def norms(
    before: str = "input_layernorm", after: str = "post_attention_layernorm"
) -> tuple[Row, ...]:
    """The norms of attention's and the FFN's input."""
    return tuple(
        Row(f"{LAYER}{theirs}.{kind}", (f"{ours}/{name}",), vector=True)
        for theirs, ours in ((before, "attention_norm"), (after, "ffn_norm"))
        for kind, name in (("weight", "scale_D"), ("bias", "bias_D"))
    )


def attention(node: str = "self_attn") -> tuple[Row, ...]:
    """Grouped-query attention, with its biases, norms and sinks."""
    at = f"{LAYER}{node}."
    return (
        Row(f"{at}q_proj.weight", ("attention/query_DHI",)),
        Row(f"{at}k_proj.weight", ("attention/key_DJI",)),
        Row(f"{at}v_proj.weight", ("attention/value_DJI",)),
        Row(f"{at}o_proj.weight", ("attention/out_HID",)),
        Row(f"{at}q_proj.bias", ("attention/query_bias_HI",), vector=True),
        Row(f"{at}k_proj.bias", ("attention/key_bias_JI",), vector=True),
        Row(f"{at}v_proj.bias", ("attention/value_bias_JI",), vector=True),
        Row(f"{at}o_proj.bias", ("attention/out_bias_D",), vector=True),
        Row(f"{at}q_norm.weight", ("attention/query_norm/scale_D",), vector=True),
        Row(f"{at}k_norm.weight", ("attention/key_norm/scale_D",), vector=True),
        Row(f"{at}sinks", ("attention/sink_H",), vector=True),
    )


def latent(node: str = "self_attn") -> tuple[Row, ...]:
    """Multi-head latent attention."""
    at = f"{LAYER}{node}."
    down = ("attention/down_DR", "attention/key_rope_DI")
    return (
        Row(f"{at}q_proj.weight", ("attention/query_RHI",), instead="attention/query_down_DR"),
        Row(f"{at}q_b_proj.weight", ("attention/query_RHI",), beside="attention/query_down_DR"),
        Row(f"{at}q_a_proj.weight", ("attention/query_down_DR",)),
        Row(f"{at}q_a_proj.bias", ("attention/query_down_bias_R",), vector=True),
        Row(f"{at}q_a_layernorm.weight", ("attention/query_norm/scale_D",), vector=True),
        Row(f"{at}kv_a_proj_with_mqa.weight", down),
        Row(
            f"{at}kv_a_proj_with_mqa.bias",
            ("attention/down_bias_R", "attention/key_rope_bias_I"),
            vector=True,
        ),
        Row(f"{at}kv_a_layernorm.weight", ("attention/norm/scale_D",), vector=True),
        Row(
            f"{at}kv_b_proj.weight",
            ("attention/key_RHI", "attention/value_RHI"),
            join="heads",
        ),
        Row(f"{at}o_proj.weight", ("attention/out_HID",)),
        Row(f"{at}o_proj.bias", ("attention/out_bias_D",), vector=True),
    )


def dense(node: str = "mlp") -> tuple[Row, ...]:
    """A dense feed-forward network."""
    return _ffn(f"{LAYER}{node}.", "ffn/")


def shared(node: str, factor: float = 1.0) -> tuple[Row, ...]:
    """The shared experts, as one network. ``factor``: of its output."""
    gate, up, down = _ffn(f"{LAYER}{node}.", "ffn/shared/")
    return gate, up, dataclasses.replace(down, factor=factor)


def router(node: str) -> tuple[Row, ...]:
    """The router's matrix and bias."""
    return (
        Row(f"{LAYER}{node}.weight", ("ffn/router/router_DE",)),
        Row(f"{LAYER}{node}.bias", ("ffn/router/bias_E",), vector=True),
    )


def experts(node: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Experts with three matrices each."""
    at = f"{LAYER}{node}.{{expert}}."
    return (
        Row(f"{at}{gate}.weight", ("ffn/gate_EDF",)),
        Row(f"{at}{up}.weight", ("ffn/up_EDF",)),
        Row(f"{at}{down}.weight", ("ffn/down_EFD",)),
    )


def _ffn(theirs: str, ours: str) -> tuple[Row, Row, Row]:
    return (
        Row(f"{theirs}gate_proj.weight", (f"{ours}gate_DF",)),
        Row(f"{theirs}up_proj.weight", (f"{ours}up_DF",)),
        Row(f"{theirs}down_proj.weight", (f"{ours}down_FD",)),
    )


QWEN_EXPERTS = experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
"""Experts as Qwen, OLMoE and DeepSeek name them."""
