"""DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (2405.04434), V3 (2412.19437), and the models that
took V3's router to grouped queries: dots1 (2506.05767) and GLM-4.5 (2508.06471)."""

import dataclasses
from typing import Any

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
    latent,
    norms,
    router,
    shared,
)
from moejax.hf.families.llama import ALL_BIASES
from moejax.hf.families.qwen import GATE
from moejax.hf.keys import (
    Choice,
    Fields,
    FirstDense,
    Fixed,
    Gate,
    HeadWidth,
    Key,
    Only,
    Rope,
    Theirs,
    Window,
)
from moejax.hf.rows import GATE_STATE, Row


@dataclasses.dataclass(frozen=True)
class SharedExperts:
    """The number of shared experts, each as wide as a routed one."""

    def read(self, theirs: Theirs) -> Fields:
        count = theirs.whole("n_shared_experts", 0)
        return {
            "moe.shared_experts": min(count, 1),
            "moe.shared_d_ff": count * theirs.whole("moe_intermediate_size"),
        }

    def write(self, fields: Fields) -> dict[str, Any]:
        count, rest = divmod(fields["moe.shared_d_ff"], fields["moe.d_ff"])
        return {"n_shared_experts": 0 if rest else count}  # their configs take no null


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention."""

    def read(self, theirs: Theirs) -> Fields:
        heads = theirs.whole("num_attention_heads")
        return {
            "model.num_heads": heads,
            "model.num_kv_heads": heads,
            "model.mla_kv_rank": theirs.whole("kv_lora_rank"),
            "model.mla_query_rank": theirs.whole("q_lora_rank", 0),
            "model.mla_plain_width": theirs.whole("qk_nope_head_dim"),
            "model.mla_rope_width": theirs.whole("qk_rope_head_dim"),
            "model.mla_value_width": theirs.whole("v_head_dim"),
            "model.qk_norm_eps": 1e-6,
        }

    def write(self, fields: Fields) -> dict[str, Any]:
        heads = fields["model.num_heads"]
        plain, rope = fields["model.mla_plain_width"], fields["model.mla_rope_width"]
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "kv_lora_rank": fields["model.mla_kv_rank"],
            "q_lora_rank": fields["model.mla_query_rank"] or None,
            "qk_nope_head_dim": plain,
            "qk_rope_head_dim": rope,
            "qk_head_dim": plain + rope,
            "head_dim": rope,
            "v_head_dim": fields["model.mla_value_width"],
        }


@dataclasses.dataclass(frozen=True)
class GroupLimited:
    """V2's router: softmax, and with ``group_limited_greedy`` only the best groups of experts."""

    def read(self, theirs: Theirs) -> Fields:
        method = theirs.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise theirs.refuse("topk_method", method, "'greedy' and 'group_limited_greedy'")
        limited = method != "greedy"
        return {
            "moe.gate": {
                "name": "loss_free",
                "k": theirs.whole("num_experts_per_tok"),
                "score": "softmax",
                "renormalize": False,
                "route_scale": float(theirs.number("routed_scaling_factor", 1.0)),
                "bias_rate": 0.0,
                "num_groups": theirs.whole("n_group") if limited else 1,
                "top_groups": theirs.whole("topk_group") if limited else 1,
                "group_score": "max",
                "sequence_loss": 0.0,
            }
        }

    def write(self, fields: Fields) -> dict[str, Any]:
        gate = fields["moe.gate"]
        limited = gate.get("num_groups", 1) > 1
        return {
            "num_experts_per_tok": gate.get("k", 1),
            "routed_scaling_factor": gate.get("route_scale", 1.0),
            "topk_method": "group_limited_greedy" if limited else "greedy",
            "n_group": gate["num_groups"] if limited else None,
            "topk_group": gate["top_groups"] if limited else None,
        }


_SIGMOID = {"score": "sigmoid", "group_score": "top2", "bias_rate": 0.001, "sequence_loss": 0.0}

BIASED = Gate(
    "loss_free",
    (
        ("num_experts_per_tok", "k", None),
        ("norm_topk_prob", "renormalize", False),
        ("routed_scaling_factor", "route_scale", 1.0),
        ("n_group", "num_groups", 1),
        ("topk_group", "top_groups", 1),
    ),
    _SIGMOID,
)
"""V3's router: sigmoid scores, and a bias that takes part in the selection alone."""

_EXPERTS = (
    FirstDense(),
    Key("intermediate_size", "model.d_ff"),
    Key("moe_intermediate_size", "moe.d_ff"),
    Key("n_routed_experts", "moe.num_experts"),
    SharedExperts(),
)

_ROWS = (
    *ENDS,
    *norms(),
    *dense(),
    *router("mlp.gate"),
    *QWEN_EXPERTS,
    *shared("mlp.shared_experts"),
)
_BIAS = Row(
    f"{LAYER}mlp.gate.e_score_correction_bias", (f"{GATE_STATE}bias_E",), vector=True, wide=True
)
_LATENT = (*DECODER, Epsilon(also=False), Latent(), Rope(interleaved=True, latent=True), ALL_BIASES)

DEEPSEEK = Family(
    "deepseek",
    "DeepseekForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(named=False),
        Rope(),
        ALL_BIASES,
        Only("scoring_func", "softmax"),
        *_EXPERTS,
        GATE,
        AuxiliaryLoss(),
    ),
    rows=(*_ROWS, *attention()),
    writes=False,  # transformers does not have it: its code is in the models' own folders
)

DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    rules=(
        *_LATENT,
        Only("mlp_bias", False),
        Only("norm_topk_prob", False),
        Only("scoring_func", "softmax"),
        *_EXPERTS,
        GroupLimited(),
    ),
    rows=(*_ROWS, *latent()),
)

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    rules=(
        *_LATENT,
        Choice(
            "rope_interleave",
            "model.rope_interleaved",
            ((True, True), (False, False)),
            default=True,
        ),
        Only("scoring_func", "sigmoid"),
        *_EXPERTS,
        dataclasses.replace(
            BIASED,
            keys=tuple(
                {"norm_topk_prob": ("norm_topk_prob", "renormalize", True)}.get(key[0], key)
                for key in BIASED.keys
            ),
        ),
    ),
    rows=(*_ROWS, *latent(), _BIAS),
)

DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(),
        ALL_BIASES,
        Window(),
        Fixed({"model.qk_norm": "head"}),
        *_EXPERTS,
        BIASED,
    ),
    rows=(*_ROWS, *attention(), _BIAS),
)

GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    rules=(
        *DECODER,
        Epsilon(),
        HeadWidth(),
        Rope(share=0.5),
        Choice(
            "attention_bias",
            "model.attention_bias",
            ((False, "none"), (True, "qkv")),
            default=False,
        ),
        Choice("use_qk_norm", "model.qk_norm", ((False, "none"), (True, "head")), default=False),
        *_EXPERTS,
        BIASED,
    ),
    rows=(*_ROWS, *attention(), _BIAS),
)
