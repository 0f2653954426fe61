"""Published models: a gate's fields, and the settings around the gate.

Weights of losses are converted to losses that are 1 at balance, but not for the number of layers
(docs/losses.md).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """A gate with certain fields and settings.

    Attributes:
      gate: the gate's name in ``moejax.gating.GATES``.
      fields: values of the gate's fields; the others keep their defaults.
      moe: values of other ``moe.*`` fields.
      source: the published model; empty if the gate's own page has it.
    """

    gate: str
    fields: Mapping[str, Any]
    moe: Mapping[str, Any]
    source: str = ""


UNBALANCED = {"losses.load_balance": 0.0, "losses.z": 0.0}
"""For gates that need no balance loss and whose logits need not stay small."""

CELLS = {"transport": "cells"}
"""For models that drop what exceeds a capacity; each names its factor."""

PRESETS: dict[str, Preset] = {
    "switch": Preset(
        "top_k",
        {"k": 1, "renormalize": False, "jitter": 0.01},
        moe={
            **CELLS,
            "capacity_factor": 1.25,
            "balance_scope": "batch",
            "losses.load_balance": 0.01,
            "losses.z": 0.0,
        },
        source="Fedus, Zoph, Shazeer (Switch: alpha = 0.01 in section 2.2; capacity 1.25 and "
        "jitter 0.01 as in Mesh TensorFlow), arXiv 2101.03961",
    ),
    "mixtral": Preset(
        "top_k",
        {"k": 2, "renormalize": True},
        moe={
            "transport": "dropless",
            "balance_scope": "batch",
            "losses.load_balance": 0.04,
            "losses.z": 0.0,
        },
        source="Jiang et al. (Mixtral 8x7B; router_aux_loss_coef 0.02 of its config.json, of a "
        "loss that is k at balance), arXiv 2401.04088",
    ),
    "deepseek_moe": Preset(
        "top_k",
        {"k": 6, "renormalize": False},
        moe={
            "shared_experts": 2,
            "transport": "dropless",
            "losses.load_balance": 0.001,
            "losses.z": 0.0,
        },
        source="Dai et al. (DeepSeekMoE 16B: 6 of 64, section 5.1.2), arXiv 2401.06066",
    ),
    "qwen_moe": Preset(
        "top_k",
        {"k": 4, "renormalize": False},
        moe={
            "shared_experts": 4,
            "shared_gate": True,
            "transport": "dropless",
            "balance_scope": "batch",
            "losses.load_balance": 0.004,
            "losses.z": 0.0,
        },
        source="Qwen Team (Qwen1.5-MoE-A2.7B: 4 of 60; router_aux_loss_coef 0.001 of its "
        "config.json, of a loss that is k at balance); Yang et al. (Qwen2), arXiv 2407.10671",
    ),
    "olmoe": Preset(
        "top_k",
        {"k": 8, "renormalize": False},
        moe={
            "transport": "dropless",
            "balance_scope": "batch",
            "losses.load_balance": 0.01,
            "losses.z": 0.001,
        },
        source="Muennighoff et al. (OLMoE 1B-7B: 8 of 64), arXiv 2409.02060",
    ),
    "openmoe": Preset(
        "top_k",
        {"k": 2, "renormalize": False},
        moe={
            "shared_experts": 1,
            **CELLS,
            "capacity_factor": 1.25,
            "priority": "choice",
            "losses.load_balance": 0.02,
            "losses.z": 0.0001,
        },
        source="Xue et al. (OpenMoE: 2 of 32; 0.01 of a loss that is k at balance; slots as in "
        "Flaxformer's TokensChooseMaskedRouter), arXiv 2402.01739",
    ),
    "residual_moe": Preset(
        "top_k",
        {"k": 1, "renormalize": False},
        moe={
            "shared_experts": 1,
            "residual": True,
            **CELLS,
            "capacity_factor": 1.0,
            "balance_scope": "batch",
            "losses.load_balance": 0.01,
            "losses.z": 0.0,
        },
        source="Rajbhandari et al. (DeepSpeed-MoE, the residual of PR-MoE; loss and capacity of "
        "its training scripts), arXiv 2201.05596",
    ),
    "deepseek_v2": Preset(
        "loss_free",
        {
            "k": 6,
            "score": "softmax",
            "renormalize": False,
            "route_scale": 16.0,
            "bias_rate": 0.0,
            "num_groups": 8,
            "top_groups": 3,
            "group_score": "max",
            "sequence_loss": 0.0,
            "device_loss": 0.05,
        },
        moe={
            "shared_experts": 2,
            "transport": "dropless",
            "losses.load_balance": 0.003,
            "losses.z": 0.0,
        },
        source="DeepSeek-AI (DeepSeek-V2: 6 of 160 on 3 of 8 devices, section 3.1.2), "
        "arXiv 2405.04434",
    ),
    "deepseek_v3": Preset(
        "loss_free",
        {
            "k": 8,
            "score": "sigmoid",
            "renormalize": True,
            "route_scale": 2.5,
            "bias_rate": 0.001,
            "num_groups": 8,
            "top_groups": 4,
            "group_score": "top2",
            "sequence_loss": 0.0001,
        },
        moe={"shared_experts": 1, "transport": "dropless", **UNBALANCED},
        source="DeepSeek-AI (DeepSeek-V3: 8 of 256 on 4 of 8 nodes, section 4.2), arXiv 2412.19437",
    ),
    "expert_choice_causal": Preset("expert_choice", {"eval_policy": "threshold"}, moe=UNBALANCED),
}
"""Presets by name."""
